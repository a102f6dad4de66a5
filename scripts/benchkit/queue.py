"""``scripts/bench queue``: the data path of virtio-blk alone, beside QEMU's microvm.

A guest of a few hundred bytes without a kernel drives the device from ring 3 over a file in memory and counts. Both
monitors get the same guest and file; QEMU has an iothread and whichever ``aio`` is faster.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchkit.lines import Lines
from benchkit.measure import QEMU_BARE_CPU, MeasureError

RATIO_PROMISE = 1.0
PROJECT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).resolve().parent / "guest"
LIMIT_S = 90.0
IMAGE_SIZE = 64 << 20
FLAT_SIZES_GIB = (1, 4, 16, 64)
FLAT_LIMIT = 1.15
CELLS = ((1, 4096, 0), (1, 4096, 1), (32, 4096, 0), (32, 4096, 1), (4, 1 << 20, 0), (4, 1 << 20, 1))
COUNTS = {4096: 20_000, 1 << 20: 1_000}
MACHINE = "microvm,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off,acpi=off"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSample:
    """One run of the guest.

    Attributes:
        rate: Requests a second.
        request_us: Of the whole run, for each request.
        kick_us: What one kick takes the guest.
        kicks: For each request.
        worker_us: CPU time of all threads but the vCPU's and the main one, for each request.
    """

    rate: float
    request_us: float
    kick_us: float
    kicks: float
    worker_us: float


def build_guest(folder: Path) -> Path:
    """Compile the guest.

    Raises:
        MeasureError: The compiler does not.
    """
    program = folder / "blk.elf"
    flags = ["-m32", "-O2", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-mno-sse", "-Wall", "-Wextra"]
    flags += ["-fno-asynchronous-unwind-tables", "-c", str(GUEST / "blk.c"), "-o", str(folder / "blk.o")]
    link = ["-m", "elf_i386", "--no-warn-rwx-segments", "-T", str(GUEST / "ring3.ld"), "-o", str(program)]
    for command in (["gcc", *flags], ["ld", *link, str(folder / "blk.o")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MeasureError(f"cannot build the guest: {done.stderr}")
    return program


def kvmlite_command(guest: Path, image: Path, cmdline: str, disk: str = "") -> list[str]:
    """kvmlite, the guest as it is."""
    return [
        sys.executable, str(PROJECT / "scripts/kvmlite"), "run", "--bare", "--kernel", str(guest), "--append", cmdline,
        "--memory", "64M", "--disk", f"{image}{disk}",
    ]  # fmt: skip


def qemu_command(guest: Path, image: Path, cmdline: str, aio: str) -> list[str]:
    """QEMU's microvm with as little as it can have, and an iothread."""
    return [
        "qemu-system-x86_64", "-M", MACHINE, "-enable-kvm", "-cpu", QEMU_BARE_CPU, "-m", "64M", "-nodefaults",
        "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", str(guest), "-append",
        cmdline, "-object", "iothread,id=io0", "-blockdev", f"file,filename={image},node-name=f0,aio={aio}",
        "-global", "virtio-mmio.force-legacy=false", "-blockdev", "raw,file=f0,node-name=d0", "-device", "virtio-blk-device,drive=d0,iothread=io0",
    ]  # fmt: skip


def worker_ns(pid: int) -> int:
    """CPU time of a process's threads but its main one and its vCPUs'."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        if int(task.name) != pid and not name.startswith(("vcpu-", "CPU ")):
            total += int((task / "schedstat").read_text().split()[0])
    return total


def run_guest(command: Sequence[str]) -> QueueSample:
    """Run it until the guest has printed its figures, then kill it.

    Raises:
        MeasureError: It ended, or did not print them in time.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        lines = Lines(process, LIMIT_S)
        _, begin = lines.wait_for(b"go\n")
        before = worker_ns(process.pid)
        lines.wait_for(b"bench ")
        elapsed = time.monotonic() - begin
        after = worker_ns(process.pid)
        figures, _ = lines.wait_for(b" end\n")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    requests, total, kicks, kick_total = (int(word, 16) for word in figures.split())
    tick_us = elapsed * 1e6 / total
    return QueueSample(
        rate=requests / elapsed,
        request_us=elapsed * 1e6 / requests,
        kick_us=kick_total * tick_us / max(kicks, 1),
        kicks=kicks / requests,
        worker_us=(after - before) / 1e3 / requests,
    )


def bench_queue(runs: int) -> int:
    """Measure and print; the exit status."""
    with tempfile.TemporaryDirectory(prefix="kvmlite-bench-", dir="/dev/shm") as name:
        folder = Path(name)
        guest = build_guest(folder)
        image = folder / "disk.img"
        image.write_bytes(os.urandom(1 << 20) * (IMAGE_SIZE >> 20))
        kept = compare_cells(guest, image, runs)
        return 0 if check_flat(guest, folder, runs) and kept else 1


def compare_cells(guest: Path, image: Path, runs: int) -> bool:
    """The table beside QEMU; whether the promise is kept."""
    print(f"virtio-blk without a kernel, file in memory, {runs} runs each, alternating; medians")
    print(
        f"{'':<18}{'kvmlite req/s':>15}{'QEMU req/s':>13}{'ratio':>7}   kick us, kicks and CPU us of workers per request"
    )
    kept = True
    for depth, size, write in CELLS:
        cmdline = f"{depth} {size} {write} {IMAGE_SIZE // 512} {COUNTS[size]}"
        ours_command = kvmlite_command(guest, image, cmdline)
        tries = {aio: qemu_command(guest, image, cmdline, aio) for aio in ("io_uring", "threads")}
        best = max(tries, key=lambda aio: run_guest(tries[aio]).rate)
        run_guest(ours_command)
        pairs = [(run_guest(ours_command), run_guest(tries[best])) for _ in range(runs)]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        ratio = statistics.median(a.rate / b.rate for a, b in pairs)
        kept = kept and ratio >= RATIO_PROMISE
        what = f"{'write' if write else 'read'} {size >> 10}K depth {depth}"
        print(
            f"{what:<18}{_median(ours, 'rate'):>15.0f}{_median(theirs, 'rate'):>13.0f}{ratio:>7.2f}   "
            f"kvmlite {_split(ours)}; QEMU ({best}) {_split(theirs)}",
            flush=True,
        )
    print(f"promise (ratio >= {RATIO_PROMISE} in every row): {'kept' if kept else 'BROKEN'}")
    return kept


def _median(samples: list[QueueSample], name: str) -> float:
    return statistics.median(getattr(sample, name) for sample in samples)


def _split(samples: list[QueueSample]) -> str:
    return f"{_median(samples, 'kick_us'):.1f} {_median(samples, 'kicks'):.2f} {_median(samples, 'worker_us'):.1f}"


def check_flat(guest: Path, folder: Path, runs: int) -> bool:
    """Time of a request by the size of the image, plain and with a copy-on-write overlay."""
    print("\ncost of a 4K request at depth 1 by image size (sparse), us: read, write, read and write in an overlay")
    times: dict[int, list[float]] = {size: [] for size in FLAT_SIZES_GIB}
    rows: dict[int, list[list[float]]] = {size: [[] for _ in range(4)] for size in FLAT_SIZES_GIB}
    for _ in range(runs):
        for size in FLAT_SIZES_GIB:
            image = folder / f"sparse-{size}.img"
            for column, (write, disk) in enumerate(((0, ""), (1, ""), (0, ",overlay"), (1, ",overlay"))):
                image.write_bytes(b"")
                os.truncate(image, size << 30)
                cmdline = f"1 4096 {write} {size << 21} 10000"
                sample = run_guest(kvmlite_command(guest, image, cmdline, disk))
                rows[size][column].append(sample.request_us)
                image.unlink()
    for size in FLAT_SIZES_GIB:
        medians = [statistics.median(column) for column in rows[size]]
        times[size] = medians
        print(f"{size:>4} GiB " + "".join(f"{value:>9.1f}" for value in medians), flush=True)
    first, last = times[FLAT_SIZES_GIB[0]], times[FLAT_SIZES_GIB[-1]]
    ratios = [b / a for a, b in zip(first, last, strict=True)]
    flat = max(ratios) <= FLAT_LIMIT
    print(f"largest over smallest {max(ratios):.2f}; promise (<= {FLAT_LIMIT}): {'kept' if flat else 'BROKEN'}")
    return flat
