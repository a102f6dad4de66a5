"""Build the guest agent: gcc and glibc's static library, nothing else.

``python -m kvmlite.guest.build_agent`` rebuilds it in place if a source is newer; ``setup.py`` does the same.
This module imports nothing of kvmlite, because setup.py loads it before there is a package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "agent"
PROGRAM = SOURCES / "kvmlite-agent"

STRICT = ("-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror")
OPTIMISED = ("-O2", "-fstack-protector-strong", "-ffunction-sections", "-fdata-sections")
LINKED = ("-static", "-Wl,--gc-sections", "-s")


class AgentBuildError(RuntimeError):
    """The compiler is missing or refused."""


def is_stale(program: Path = PROGRAM) -> bool:
    """Whether ``program`` is missing or older than a source (or than this file, which holds the flags)."""
    inputs = [*SOURCES.glob("*.[ch]"), Path(__file__)]
    if not program.exists():
        return True
    built_ns = program.stat().st_mtime_ns
    return any(source.stat().st_mtime_ns > built_ns for source in inputs)


def build(program: Path = PROGRAM, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the agent to ``program`` unless it is up to date; the file appears whole or not at all.

    Raises:
        AgentBuildError: No compiler, or it failed; the text says what it said.
    """
    if not is_stale(program):
        return program
    compiler = os.environ.get("CC", "gcc")
    partial = program.with_name(f"{program.name}.{os.getpid()}")
    sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
    command = [*compiler.split(), *STRICT, *OPTIMISED, *extra_flags, *sources, *LINKED, "-o", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise AgentBuildError(f"{compiler}: not found (install gcc and libc6-dev)") from error
    except subprocess.CalledProcessError as error:
        raise AgentBuildError(f"{' '.join(command)}\n{error.stderr}") from error
    partial.replace(program)
    return program


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
