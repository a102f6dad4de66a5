#!/usr/bin/env python3
"""A guest that is kept: two commands in the same guest, output as it comes, then where the boot time went.

Needs VT-x or AMD-V behind /dev/kvm and a kernel: ``kvmlite kernel add``. Usage: watch_boot.py [KERNEL]
"""

from __future__ import annotations

import sys

from kvmlite import GuestConfig, KvmliteError, LinuxGuest, Rng


def show(data: bytes) -> None:
    """Print output of a command as it comes; runs on the machine's device loop."""
    sys.stdout.write(data.decode(errors="replace"))


def main(arguments: list[str]) -> int:
    """Run it; the last command's exit status."""
    config = GuestConfig(kernel=arguments[0] if arguments else None, devices=(Rng(),), features=("rng",))
    with LinuxGuest(config) as guest:
        guest.start()
        guest.wait_agent()
        guest.exec(["sh", "-c", "for i in 1 2 3; do echo line $i; done"], stdout=show).wait(60)
        last = guest.exec(["cat", "/sys/class/misc/hw_random/rng_current"], stdout=show)
        report = guest.run_to_end(last)
    before = min(report.spans.values())
    for stage, at in sorted(report.spans.items(), key=lambda span: span[1]):
        print(f"{stage:<16}{(at - before) * 1e3:8.1f} ms")
    print(f"{report.statistics.exits} exits, of which Python saw {report.statistics.python_exits}")
    return 1 if report.exit_code is None else report.exit_code


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KvmliteError as error:
        raise SystemExit(f"{error}; {error.hint}" if error.hint else str(error)) from error
