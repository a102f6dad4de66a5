#!/usr/bin/env python3
"""A command in a stock Linux kernel: output, exit status, and what is known when there is none.

Needs VT-x or AMD-V behind /dev/kvm and a kernel: ``kvmlite kernel add``. Usage: run_command.py [KERNEL]
"""

from __future__ import annotations

import sys

import kvmlite


def main(arguments: list[str]) -> int:
    """Run three commands, each in a guest of its own; 0 if each ended as it should."""
    kernel = arguments[0] if arguments else None
    print(kvmlite.run("uname -a", kernel=kernel).check().stdout, end="")

    result = kvmlite.run(["sh", "-c", "wc -c; exit 3"], kernel=kernel, stdin=b"12345")
    print(f"stdout {result.stdout!r}, exit code {result.exit_code}, ok: {result.ok}")

    panic = kvmlite.run("echo c > /proc/sysrq-trigger", kernel=kernel, timeout=300)
    match panic.outcome:
        case kvmlite.Panicked():
            print(f"the kernel panicked; exit code {panic.exit_code}, {len(panic.report.console)} bytes on its console")
        case other:
            print(f"it was to panic, and ended otherwise: {other}", file=sys.stderr)
            return 1
    return 0 if (result.stdout, result.exit_code) == ("5\n", 3) else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except kvmlite.KvmliteError as error:
        raise SystemExit(f"{error}; {error.hint}" if error.hint else str(error)) from error
