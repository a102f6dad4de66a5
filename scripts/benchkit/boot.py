"""``scripts/bench boot``: from exec to the line that init prints, beside QEMU's microvm at its best settings.

Both get the same kernel, initrd (one static program that prints a line), command line, memory and vCPUs. QEMU boots an
uncompressed vmlinux faster than a bzImage, and which of its switches help differs: each variant is tried first, and the
fastest one competes. kvmlite gets the bzImage; its cache of unpacked kernels is warm, as after the first run.
"""

from __future__ import annotations

import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchkit.guest_files import unpacked
from benchkit.measure import Comparison, MeasureError, Sample, compare

RATIO_PROMISE = 0.9
PROJECT = Path(__file__).resolve().parents[2]
LINE = "kvmlite-bench-init"
CMDLINE = "console=ttyS0 quiet"
LIMIT_S = 90.0
QEMU_MACHINES = (
    "microvm,kernel-irqchip=on,acpi=on,pic=off,pit=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off",
    "microvm,acpi=on,pic=off,pit=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off",
    "microvm,acpi=off,pic=on,pit=on,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off",
)


def run_until_line(command: Sequence[str]) -> Sample:
    """From exec until the guest's line comes out of stdout; the process is then killed.

    Raises:
        MeasureError: It ended, or did not print the line in time.
    """
    start = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    seen = b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while LINE.encode() not in seen:
                left = start + LIMIT_S - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise MeasureError(
                        f"{command[0]}: no line from init within {LIMIT_S:g} s; it printed {seen[-300:]!r}"
                    )
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    raise MeasureError(f"{command[0]}: ended without a line from init; it printed {seen[-300:]!r}")
                seen += data
        wall = time.monotonic() - start
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return Sample(wall_s=wall)


class Guest:
    """The files of the measured guest, in a folder of their own."""

    def __init__(self, folder: Path, kernel: Path) -> None:
        from kvmlite.images.cpio import CpioTree
        from kvmlite.testing.guests import init_elf

        tree = CpioTree()
        tree.directory("/dev", 0o755)
        tree.device("/dev/console", 0o600, 5, 1)
        tree.file("/init", init_elf(LINE), 0o755)
        self.kernel = kernel
        self.initrd = folder / "initrd.cpio"
        self.initrd.write_bytes(tree.to_bytes())
        self.vmlinux = unpacked(kernel, folder)


def kvmlite_command(guest: Guest, memory: str, cpus: int) -> list[str]:
    """kvmlite, the guest as it is."""
    return [
        sys.executable, str(PROJECT / "scripts/kvmlite"), "run", "--bare", "--kernel", str(guest.kernel),
        "--initrd", str(guest.initrd), "--append", CMDLINE, "--memory", memory, "--cpus", str(cpus),
    ]  # fmt: skip


def qemu_command(guest: Guest, kernel: Path, machine: str, memory: str, cpus: int) -> list[str]:
    """QEMU's microvm with as little as it can have."""
    return [
        "qemu-system-x86_64", "-M", machine, "-enable-kvm", "-cpu", "host", "-m", memory, "-smp", str(cpus),
        "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
        "-kernel", str(kernel), "-initrd", str(guest.initrd), "-append", CMDLINE,
    ]  # fmt: skip


def best_qemu(guest: Guest, memory: str, cpus: int) -> list[str]:
    """The variant of QEMU that boots fastest, by one run each."""
    times: dict[float, list[str]] = {}
    for machine in QEMU_MACHINES:
        for kernel in dict.fromkeys((guest.vmlinux, guest.kernel)):
            command = qemu_command(guest, kernel, machine, memory, cpus)
            form = "vmlinux" if kernel == guest.vmlinux else "bzImage"
            switches = ",".join(machine.split(",")[1:5])
            try:
                wall = run_until_line(command).wall_s
            except MeasureError as error:
                print(f"  QEMU {switches} {form}: {str(error)[:100]}")
                continue
            print(f"  QEMU {switches} {form}: {wall:.2f} s", flush=True)
            times[wall] = command
    if not times:
        raise MeasureError("no variant of QEMU's microvm boots this kernel here")
    return times[min(times)]


def default_kernel() -> Path:
    """The store's default, or the first of the test kernels."""
    from kvmlite.errors import KvmliteError
    from kvmlite.images.kernels import resolve

    try:
        return Path(resolve(None).path)
    except KvmliteError:
        found = sorted(Path(os.environ.get("KVMLITE_TEST_KERNELS", "/nonexistent")).glob("*cloud*/boot/vmlinuz-*"))
        if not found:
            raise
        return found[0]


def bench_boot(runs: int, kernel: Path | None, memory: str, cpus: int) -> int:
    """Measure and print; the exit status."""
    import compileall

    compileall.compile_dir(PROJECT / "src", quiet=2)
    with tempfile.TemporaryDirectory(prefix="kvmlite-bench-") as folder:
        guest = Guest(Path(folder), kernel or default_kernel())
        print(
            f"exec to init's line: {guest.kernel.name}, '{CMDLINE}', {memory}, {cpus} vCPU; {runs} runs each, alternating"
        )
        theirs = best_qemu(guest, memory, cpus)
        ours = kvmlite_command(guest, memory, cpus)
        comparison: Comparison = compare(
            ("kvmlite", "QEMU microvm"), lambda: run_until_line(ours), lambda: run_until_line(theirs), runs
        )
        comparison.print_table()
    ratio = comparison.ratio(lambda sample: sample.wall_s)
    kept = ratio <= RATIO_PROMISE
    medians = [statistics.median(s.wall_s for s in samples) for samples in (comparison.ours, comparison.theirs)]
    print(
        f"median {medians[0]:.2f} s beside {medians[1]:.2f} s; promise (ratio <= {RATIO_PROMISE}): {'kept' if kept else 'BROKEN'}"
    )
    return 0 if kept else 1
