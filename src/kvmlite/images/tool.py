"""Programs that do part of the work: found, run to their end, ended with all their children on Ctrl-C."""

from __future__ import annotations

import os

from kvmlite.errors import HostError, UnsupportedError
from kvmlite.images.staging import storage_error
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

__all__ = ["Ended", "find_tool", "is_full", "run_tool", "tool_failure"]

TOOL_TIMEOUT_S = 3600.0
TOOL_GRACE_S = 5.0
_SYSTEM_DIRECTORIES = ("/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program ended; a negative ``returncode`` is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


def find_tool(name: str) -> str | None:
    """Return the path of a program on PATH, or where programs for root are, which is often not on a user's PATH."""
    for directory in (*os.environ.get("PATH", "").split(":"), *_SYSTEM_DIRECTORIES):
        path = os.path.join(directory, name)
        if directory and os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return None


def run_tool(
    command: list[str],
    *,
    hint: str,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    timeout_s: float = TOOL_TIMEOUT_S,
) -> Ended:
    """Run a program to its end, in English.

    Args:
        command: Its name, found by ``find_tool``, and its arguments.
        hint: What to do if this host does not have it.
        env: Added to our environment.
        input: What it reads; nothing if None.
        timeout_s: After this many seconds it is killed, with its children.

    Raises:
        UnsupportedError: There is no such program.
        HostError: It cannot be run, or did not end in time.

    Thread: any. Blocks.
    """
    import subprocess

    path = find_tool(command[0])
    if path is None:
        raise UnsupportedError(f"no {command[0]} on this host", hint=hint)
    try:
        tool = subprocess.Popen(
            [path, *command[1:]],
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise HostError(f"cannot run {command[0]}: {error.strerror}", error.errno or 0) from error
    try:
        output, complaints = _finish(tool, input, timeout_s)
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{command[0]} has not ended within {timeout_s:g} s") from error
    return Ended(returncode=tool.returncode, stdout=output, stderr=complaints)


def _finish(tool: subprocess.Popen[str], input: str | None, timeout_s: float) -> tuple[str, str]:
    """Return what a tool printed, when it has ended. On Ctrl-C end it, and its own children: dpkg-deb has a tar that writes on."""
    import signal
    import subprocess

    with tool:
        try:
            return tool.communicate(input, timeout_s)
        except BaseException:
            _signal_group(tool.pid, signal.SIGTERM)  # mmdebstrap removes its files
            try:
                tool.communicate(None, TOOL_GRACE_S)  # until the last of them has closed its output
            except subprocess.TimeoutExpired:
                _signal_group(tool.pid, signal.SIGKILL)
                tool.communicate()
            raise


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass  # all of them have ended by themselves


def is_full(ended: Ended) -> bool:
    """Tell whether a program complained of a full disk."""
    return "no space left" in ended.stderr.lower() or "enough free space" in ended.stderr


def tool_failure(what: str, ended: Ended, *, prefixes: tuple[str, ...] = ()) -> HostError:
    """Return the error for a program that failed: one line with its own complaint.

    Args:
        what: What failed, as the beginning of the message.
        prefixes: Lines of stderr that begin so tell the reason; without one, the last line does.
    """
    import errno
    import signal

    if is_full(ended):
        return storage_error(OSError(errno.ENOSPC, ""), what)
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith(prefixes)] if prefixes else []
    if ended.returncode < 0:
        reasons = [f"killed by {signal.Signals(-ended.returncode).name}"]
    reason = (reasons or (lines[:1] if prefixes else lines[-1:]) or [f"exit status {ended.returncode}"])[0]
    return HostError(f"{what}: {reason.removeprefix('E:').strip()}")
