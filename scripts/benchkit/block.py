"""``scripts/bench block``: fio in a guest with a stock kernel, beside QEMU's microvm; in the lab.

Both monitors boot the same kernel, initramfs, vCPUs, memory and two disks: one with fio and its libraries, one to measure. The
latter is a file in memory, so that the monitors differ and the medium does not, unless ``--image`` names another. QEMU has an
iothread and whichever ``aio`` is faster in a first run of each. A guest that does not boot, does not end, or has not done a single
request of a kind in its time, is named and started once more.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchkit.boot import QEMU_MACHINES, default_kernel
from benchkit.guest_files import StockGuest
from benchkit.lines import Lines
from benchkit.measure import MeasureError

RATIO_PROMISE = 1.0
MACHINE = f"{QEMU_MACHINES[0]},ioapic2=off"  # with a second IOAPIC, interrupts of the first disks get lost
PROJECT = Path(__file__).resolve().parents[2]
IMAGE_SIZE = 256 << 20
BOOT_LIMIT_S = 180.0
"""On two cores with load 14, guests in a lab of two CPUs have taken 22 to 83 s."""
ATTEMPTS = 3
RAMP_S = 1
FIO = "/usr/bin/fio"
CELLS = {
    "randread-4k-1": "--rw=randread --bs=4k --iodepth=1",
    "randread-4k-32": "--rw=randread --bs=4k --iodepth=32",
    "randwrite-4k-1": "--rw=randwrite --bs=4k --iodepth=1",
    "randwrite-4k-32": "--rw=randwrite --bs=4k --iodepth=32",
    "read-1m-4": "--rw=read --bs=1m --iodepth=4",
    "write-1m-4": "--rw=write --bs=1m --iodepth=4",
}
INIT = """#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
while read -r module; do insmod "$module"; done < /kvmlite/modules
for disk in vda vdb; do
    case $(cat /sys/block/$disk/serial) in tools) tools=$disk ;; data) data=$disk ;; esac
done
mkdir -p /tools; mount -t ext4 -o ro /dev/$tools /tools
mount -t devtmpfs dev /tools/dev; mount -t proc proc /tools/proc; mount -t sysfs sys /tools/sys; mount -t tmpfs tmp /tools/tmp
cd /
echo bench-start
chroot /tools FIO --output-format=terse --terse-version=3 --disk_util=0 --thread --filename=/dev/$data --direct=1 \\
    --ioengine=libaio --time_based --runtime=SECONDS --ramp_time=RAMP JOBS > /out 2> /errors
awk -F';' '$1 == 3 { print "cell", $3, $5, $8 + $49 }' /out
grep -v '^3;' /out; cat /errors
echo bench-end
sleep 1000
"""


class Guest(StockGuest):
    """The files both monitors are given, in a folder of their own."""

    def __init__(self, folder: Path, kernel: Path, seconds: float, image: Path | None) -> None:
        jobs = " ".join(f"--name={name} --stonewall {options}" for name, options in CELLS.items())
        script = INIT.replace("FIO", FIO).replace("JOBS", jobs)
        script = script.replace("SECONDS", f"{seconds:g}").replace("RAMP", str(RAMP_S))
        super().__init__(folder, kernel, ("mmio", "blk", "ext4"), script)
        self.tools = _tools_image(folder)
        self.data = image or folder / "data.img"
        if image is None:
            with open(self.data, "wb") as file:
                for _ in range(IMAGE_SIZE >> 20):
                    file.write(os.urandom(1 << 20))


def _tools_image(folder: Path) -> Path:
    """An ext4 image with fio and the libraries it loads."""
    if not Path(FIO).exists():
        raise MeasureError(f"{FIO} is not installed")
    root, image = folder / "tools", folder / "tools.img"
    listed = subprocess.run(["ldd", FIO], capture_output=True, text=True, check=True).stdout
    paths = {word for line in listed.splitlines() for word in line.split() if word.startswith("/")} | {FIO}
    for path in paths:
        target = root / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("dev", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image), "160M"], check=True)
    shutil.rmtree(root)
    return image


def kvmlite_command(guest: Guest, cmdline: str, cpus: int, words: str) -> list[str]:
    """kvmlite, the guest as it is."""
    return [
        sys.executable, str(PROJECT / "scripts/kvmlite"), "run", "--bare", "--kernel", str(guest.kernel), "--initrd",
        str(guest.initrd), "--append", cmdline, "--memory", "512M", "--cpus", str(cpus),
        "--disk", f"{guest.tools},ro,serial=tools", "--disk", f"{guest.data},serial=data{words}",
    ]  # fmt: skip


def qemu_command(guest: Guest, cmdline: str, cpus: int, aio: str, direct: bool) -> list[str]:
    """QEMU's microvm with an iothread for the measured disk."""
    cache = f"cache.direct={'on' if direct else 'off'}"
    return [
        "qemu-system-x86_64", "-M", MACHINE, "-enable-kvm", "-cpu", "host", "-m", "512M", "-smp", str(cpus),
        "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
        "-kernel", str(guest.vmlinux), "-initrd", str(guest.initrd), "-append", cmdline,
        "-global", "virtio-mmio.force-legacy=false", "-object", "iothread,id=io0",
        "-blockdev", f"file,filename={guest.tools},node-name=f0,read-only=on", "-blockdev", "raw,file=f0,node-name=d0,read-only=on",
        "-device", "virtio-blk-device,drive=d0,serial=tools",
        "-blockdev", f"file,filename={guest.data},node-name=f1,aio={aio},{cache}", "-blockdev", "raw,file=f1,node-name=d1",
        "-device", "virtio-blk-device,drive=d1,serial=data,iothread=io0",
    ]  # fmt: skip


def run_guest(command: Sequence[str], fio_limit_s: float) -> dict[str, float]:
    """Boot, and the requests a second of each cell.

    Raises:
        MeasureError: It did not get to the end in time, or a job of fio failed or did nothing.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        lines = Lines(process, BOOT_LIMIT_S)
        lines.wait_for(b"bench-start")
        printed, _ = lines.wait_for(b"bench-end", fio_limit_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    rates = {}
    for line in printed.decode(errors="replace").splitlines():
        words = line.split()
        if words[:1] == ["cell"] and words[2] == "0":
            rates[words[1]] = float(words[3])
    missing = [cell for cell in CELLS if not rates.get(cell)]
    if missing:
        raise MeasureError(f"fio did nothing of {', '.join(missing)}: {printed[-1500:].decode(errors='replace')}")
    return rates


def measured(side: str, command: Sequence[str], seconds: float) -> dict[str, float]:
    """The requests a second of each cell; ``side`` is the monitor's name.

    Raises:
        MeasureError: As often as it was started, it did not do it.
    """
    # All the time it measures, four times over for what lies between the jobs, and a minute to start.
    fio_limit_s = 60 + 4 * len(CELLS) * (RAMP_S + seconds)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return run_guest(command, fio_limit_s)
        except MeasureError as error:
            print(f"  {side}, attempt {attempt} of {ATTEMPTS}: {error}", flush=True)
    raise MeasureError(f"{side} did not get to the end in {ATTEMPTS} attempts")


def bench_block(
    runs: int, kernel: Path | None, cpus: int, seconds: float, image: Path | None, direct: bool, words: str
) -> int:
    """Measure and print; the exit status."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvmlite-bench-", dir="/dev/shm") as folder:
        guest = Guest(Path(folder), kernel or default_kernel(), seconds, image)
        cmdline = "console=ttyS0 quiet rdinit=/bench"
        ours = kvmlite_command(guest, cmdline, cpus, (",direct" if direct else "") + words)
        tries = {aio: qemu_command(guest, cmdline, cpus, aio, direct) for aio in ("io_uring", "threads")}
        print(
            f"fio, {guest.kernel.name}, {cpus} vCPU, {'direct' if direct else 'cached'}; {runs} runs each, alternating",
            flush=True,
        )
        first = {aio: measured(f"QEMU {aio}", command, seconds) for aio, command in tries.items()}
        best = {cell: max(first, key=lambda aio, cell=cell: first[aio][cell]) for cell in CELLS}
        chosen = max(tries, key=list(best.values()).count)
        print(f"QEMU's faster aio by cell: {best}; competing: {chosen}", flush=True)
        pairs = []
        for number in range(runs):
            pairs.append((measured("kvmlite", ours, seconds), measured("QEMU", tries[chosen], seconds)))
            ratios = " ".join(f"{c}={pairs[-1][0][c] / pairs[-1][1][c]:.2f}" for c in CELLS)
            print(f"  run {number + 1}, {time.monotonic() - begin:.0f} s since the start: {ratios}", flush=True)
    print(f"{'median requests/s':<20}{'kvmlite':>10}{'QEMU':>10}{'ratio':>8}")
    kept = True
    for cell in CELLS:
        ours_rate, theirs_rate = (statistics.median(pair[side][cell] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(a[cell] / b[cell] for a, b in pairs)
        kept = kept and ratio >= RATIO_PROMISE
        print(f"{cell:<20}{ours_rate:>10.0f}{theirs_rate:>10.0f}{ratio:>8.2f}")
    print(f"promise (ratio >= {RATIO_PROMISE} in every cell): {'kept' if kept else 'BROKEN'}")
    return 0 if kept else 1
