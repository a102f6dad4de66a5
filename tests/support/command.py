"""The ``kvmlite`` command as a shell starts it: in a process of its own, with an empty home and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = (sys.executable, str(ROOT / "scripts/kvmlite"))
_GRACE_S = 30.0
_LIMIT_S = 250.0 if os.environ.get("KVMLITE_LAB") == "1" else 60.0  # of a run: a lab is slow


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run of the command ended."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def complaint(self) -> str:
        """The one line on stderr.

        Raises:
            AssertionError: There is not exactly one, or it is not kvmlite's.
        """
        lines = self.stderr.splitlines()
        assert len(lines) == 1, f"exit code {self.code}, on stderr:\n{self.stderr}"
        assert lines[0].startswith("kvmlite: "), self.stderr
        return lines[0].removeprefix("kvmlite: ")


def _all_of(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


class Command:
    """Runs ``kvmlite`` with HOME, KVMLITE_HOME and TMPDIR below ``directory``.

    Args:
        directory: Made if need be; other users may look into it.
        environment: Set on top, for every run.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.home = directory / "kvmlite-home"
        self.temporary = directory / "tmp"
        self.temporary.mkdir(parents=True)
        self.temporary.chmod(0o1777)
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "KVMLITE_HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "LANG": "C.UTF-8",
            "PYTHONWARNINGS": "error",
            "PYTHONDONTWRITEBYTECODE": "1",
            **(environment or {}),
        }
        self._sessions: list[int] = []

    def start(
        self, *arguments: str | Path, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start it in a session of its own; ``prefix`` goes before the command, ``options`` to Popen."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [*prefix, *COMMAND, *map(str, arguments)],
            env={**self._environment, **(env or {})},
            start_new_session=True,
            **{**streams, **options},
        )
        self._sessions.append(process.pid)
        return process

    def finish(
        self, process: subprocess.Popen[bytes], *, timeout_s: float = _LIMIT_S, input: bytes | None = None
    ) -> Ended:
        """Wait for it.

        Raises:
            AssertionError: It does not end; it is killed then.
        """
        try:
            stdout, stderr = process.communicate(input, timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            raise AssertionError(
                f"{process.args} still runs after {timeout_s:g} s; it printed {stdout[-2000:]!r} and {stderr[-2000:]!r}"
            ) from None
        return Ended(code=process.returncode, stdout=stdout or b"", stderr=(stderr or b"").decode(errors="replace"))

    def __call__(
        self, *arguments: str | Path, timeout_s: float = _LIMIT_S, input: bytes | None = None, **options: Any
    ) -> Ended:
        """Run it to its end."""
        if input is not None:
            options["stdin"] = subprocess.PIPE
        return self.finish(self.start(*arguments, **options), timeout_s=timeout_s, input=input)

    def here(self, *arguments: str | Path) -> Ended:
        """Run it in this process, which saves the start of another one. For what is refused before a guest runs."""
        from kvmlite.cli.main import main

        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name, value in self._environment.items():
                patch.setenv(name, value)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.getsignal(number))
            out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            with open(os.devnull) as null:
                for fd, file in enumerate((null, out, err)):
                    kept = os.dup(fd)
                    stack.callback(os.close, kept)
                    stack.callback(os.dup2, kept, fd)
                    os.dup2(file.fileno(), fd)
            sys.stdout.flush()
            code = main([str(argument) for argument in arguments])
            sys.stdout.flush()
            return Ended(code=code, stdout=_all_of(out), stderr=_all_of(err).decode(errors="replace"))

    def shell(self, script: str, *arguments: str | Path, timeout_s: float = _LIMIT_S, **options: Any) -> Ended:
        """Run a shell's script in which ``"$@"`` is the command with ``arguments``."""
        return self(*arguments, prefix=("/bin/bash", "-c", script, "bash"), timeout_s=timeout_s, **options)

    def remains(self) -> list[str]:
        """What runs have left: processes, and files in TMPDIR and in the store's places for drafts."""
        deadline = time.monotonic() + _GRACE_S
        while (processes := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        files = list(self.temporary.rglob("*"))
        files += [path for path in self.home.rglob("*") if path.name.startswith((".new-", ".tmp", ".staging", "tmp"))]
        return [*processes, *map(str, files)]

    def _processes(self) -> list[str]:
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdecimal():
                continue
            try:
                fields = Path("/proc", entry, "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            name, _, rest = fields.partition("(")[2].rpartition(")")
            if int(rest.split()[3]) in self._sessions:
                found.append(f"process {entry} ({name})")
        return found
