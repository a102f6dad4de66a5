"""Programs of tests/native, compiled with what they test under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.requirements import ROOT

NATIVE = ROOT / "src/kvmlite/_native/src"
STRICT = ("-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror")
TIMEOUT_S = 250
"""Limit for each compilation and each run, against a hang."""


def compile_sanitized(
    program: Path,
    needed: Iterable[str],
    *,
    compiler: str = "gcc",
    flags: Iterable[str] = ("-fsanitize=address,undefined",),
) -> str:
    """Compile ``tests/native/PROGRAM.c`` with the needed sources of the data plane; returns the program's path."""
    sources = [ROOT / f"tests/native/{program.name}.c", *(NATIVE / f"{name}.c" for name in needed)]
    options = ["-g", "-O1", *flags, "-fno-sanitize-recover=all", f"-I{NATIVE}", "-pthread"]
    return build_program(program, [compiler, *STRICT, *options], sources)


def build_program(program: Path, command: Sequence[str], sources: Iterable[Path]) -> str:
    """Compile the sources on all processors, and link them to a program in a folder of its own; returns its path."""

    def compiled(source: Path) -> str:
        target = f"{program}-{source.stem}.o"
        _say_if_it_fails(*command, "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        objects = list(executor.map(compiled, sources))
    _say_if_it_fails(*command, *objects, "-o", str(program))
    return str(program)


def _say_if_it_fails(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr


def run_sanitized(*command: str) -> str:
    """Return what a program prints; the test fails with what a sanitizer has to say."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def counts(*command: str) -> list[int]:
    """Return the numbers a fuzz target prints at its end."""
    return [int(word) for word in run_sanitized(*command).split()]
