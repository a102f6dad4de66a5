#!/usr/bin/env python3
"""Several machines in one process, each driven by its own thread: paused, resumed, stopped. Runs on any /dev/kvm.

The guests count in a loop and never end by themselves. While a machine is paused its vCPU does not run; the process,
the other machines and their threads go on.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

from kvmlite import ExitReport, Kernel, Machine, MachineConfig, Stopped
from kvmlite.testing.guests import pvh_elf

COUNT = 4
LOOP = b"\x40\xe6\x80\xeb\xfb"  # 1: inc eax; out 0x80, al; jmp 1b


def drive(machine: Machine, reports: list[ExitReport]) -> None:
    """Start one, pause and resume it a few times, stop it."""
    machine.start()
    for _ in range(3):
        time.sleep(0.02)
        machine.pause()
        time.sleep(0.01)
        machine.resume()
    machine.stop("seen enough")
    reports.append(machine.wait(timeout_s=10))


def main() -> int:
    """Run them; 0 if each was stopped by us after it had done something."""
    reports: list[ExitReport] = []
    with tempfile.TemporaryDirectory() as folder:
        guest = Path(folder, "guest.elf")
        guest.write_bytes(pvh_elf(LOOP))
        config = MachineConfig(kernel=Kernel(path=guest), memory_mib=16)
        machines = [Machine(config) for _ in range(COUNT)]
        threads = [threading.Thread(target=drive, args=(machine, reports)) for machine in machines]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for machine in machines:
                machine.close()
    for report in reports:
        print(
            f"{report.outcome}: {report.statistics.exits} exits, of which Python saw {report.statistics.python_exits}"
        )
    done = [report for report in reports if report.outcome == Stopped(detail="seen enough") and report.statistics.exits]
    if len(done) < COUNT:
        print(f"only {len(done)} of {COUNT} machines ran", file=sys.stderr)
    return 0 if len(done) == COUNT else 1


if __name__ == "__main__":
    raise SystemExit(main())
