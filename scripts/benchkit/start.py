"""``scripts/bench start``: how long until a bare guest's first port write."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchkit.measure import QEMU_BARE_CPU, Sample, compare, print_figures, run_process

WALL_PROMISE = 1.0
MEMORY_PROMISE = 0.6
LIBRARY_PROMISE_MS = 3.0
PROJECT = Path(__file__).resolve().parents[2]


def qemu_command(guest: Path) -> list[str]:
    """QEMU's microvm machine with everything off that can be."""
    machine = "microvm,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off,auto-kernel-cmdline=off,acpi=off"
    return [
        "qemu-system-x86_64", "-M", machine, "-enable-kvm", "-cpu", QEMU_BARE_CPU, "-m", "128M", "-nodefaults",
        "-no-user-config", "-nographic", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-kernel", str(guest),
    ]  # fmt: skip


def library_times_ms(guest: Path, runs: int) -> list[float]:
    """From a config to the guest's first port write, the library being imported; one warm-up run first."""
    from kvmlite import Kernel, Machine, MachineConfig

    times = []
    for _ in range(runs + 1):
        start = time.monotonic()
        with Machine(MachineConfig(kernel=Kernel(path=guest), memory_mib=128)) as machine:
            machine.start()
            report = machine.wait(timeout_s=10)
        if report.exit_code != 43:
            raise SystemExit(f"the guest ended otherwise: {report.outcome}")
        times.append((report.spans["ended"] - start) * 1e3)
    return times[1:]


def bench_start(runs: int) -> int:
    """Measure and print; the exit status."""
    import compileall

    from kvmlite.testing.guests import debug_exit_code, pvh_elf

    compileall.compile_dir(PROJECT / "src", quiet=2)  # as an installation does
    with tempfile.TemporaryDirectory(prefix="kvmlite-bench-") as folder:
        guest = Path(folder) / "guest.elf"
        guest.write_bytes(pvh_elf(debug_exit_code(21)))
        ours = [
            sys.executable,
            str(PROJECT / "scripts/kvmlite"),
            "run",
            "--bare",
            "--kernel",
            str(guest),
            "--memory",
            "128M",
        ]

        def run_ours() -> Sample:
            return run_process(ours, expect=43)

        def run_theirs() -> Sample:
            return run_process(qemu_command(guest), expect=43)

        print(f"exec to first port write to exit, 128 MiB, 1 vCPU, {runs} runs each, alternating")
        comparison = compare(("kvmlite", "QEMU microvm"), run_ours, run_theirs, runs)
        comparison.print_table()
        library = library_times_ms(guest, runs)
        print("library, config to first port write (ms)")
        print_figures("kvmlite", library)
    kept = (
        comparison.ratio(lambda sample: sample.wall_s) <= WALL_PROMISE
        and comparison.ratio(lambda sample: sample.peak_mib) <= MEMORY_PROMISE
        and statistics.median(library) <= LIBRARY_PROMISE_MS
    )
    print(
        f"promises (wall <= {WALL_PROMISE}x, peak <= {MEMORY_PROMISE}x, library <= {LIBRARY_PROMISE_MS:g} ms):", end=" "
    )
    print("kept" if kept else "BROKEN")
    return 0 if kept else 1
