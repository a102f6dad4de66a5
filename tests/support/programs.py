"""Guests of a few bytes: assembly text becomes a PVH kernel.

``guest.inc`` is put in front of each (entry, macros ``debug_exit``, ``outb``, ``take_interrupts``, ``route_pin``).
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

_HERE = Path(__file__).resolve().parent


class Assembler:
    """Assembles guests into ``directory``; the same text only once. Needs binutils."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, source: str) -> Path:
        """Path of the kernel.

        Raises:
            AssertionError: The text does not assemble; with what the assembler says.
        """
        base = self._directory / hashlib.sha256(source.encode()).hexdigest()[:16]
        kernel = base.with_suffix(".elf")
        if not kernel.exists():
            base.with_suffix(".s").write_text('.include "guest.inc"\n' + source + "\n")
            _run("as", "--32", "-I", str(_HERE), "-o", f"{base}.o", f"{base}.s")
            script = str(_HERE / "guest.ld")
            _run("ld", "-m", "elf_i386", "--no-warn-rwx-segments", "-T", script, "-o", str(kernel), f"{base}.o")
        return kernel


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command[0]}: {result.stderr}"
