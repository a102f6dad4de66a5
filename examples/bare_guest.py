#!/usr/bin/env python3
"""A guest of a few bytes, from a config to its exit status. Runs on any /dev/kvm.

The guest is machine code with a PVH note: it writes "hi" and a newline to the serial port, then 21 to the debug-exit
port, which ends the machine with status 2 * 21 + 1.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from kvmlite import Exited, Kernel, Machine, MachineConfig
from kvmlite.testing.guests import debug_exit_code, pvh_elf


def print_code(text: bytes) -> bytes:
    """Machine code that writes ``text`` to the first serial port: mov dx, 0x3f8; then mov al, byte; out dx, al for each."""
    return b"\x66\xba\xf8\x03" + b"".join(bytes([0xB0, byte, 0xEE]) for byte in text)


def main() -> int:
    """Run it; 0 if the guest ended as it should."""
    with tempfile.TemporaryDirectory() as folder:
        guest = Path(folder, "guest.elf")
        guest.write_bytes(pvh_elf(print_code(b"hi\n") + debug_exit_code(21)))
        start = time.monotonic()
        with Machine(MachineConfig(kernel=Kernel(path=guest), memory_mib=16)) as machine:
            machine.start()
            report = machine.wait(timeout_s=10)
        print(f"{report.outcome} after {(report.spans['ended'] - start) * 1e3:.1f} ms")
    print(f"console: {report.console!r}; exits: {report.statistics.exits_by_reason}")
    return 0 if report.outcome == Exited(code=43) else 1


if __name__ == "__main__":
    raise SystemExit(main())
