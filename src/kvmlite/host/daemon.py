"""A helper process that a device has beside it (virtiofsd, qemu-storage-daemon, passt): started, watched, ended.

    daemon = Daemon("passt", ["passt", "--foreground", "--fd", str(fd)], pass_fds=(fd,), package="passt")
    daemon.watch(loop, lambda: warn(f"passt {daemon.end_text()}"))
    ...
    daemon.end()

It never outlives this process: not when this process is killed, and not when the thread that started it is gone.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import threading

from kvmlite.errors import HostError
from kvmlite.host.eventfd import EventFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Protocol

    class Loop(Protocol):
        """What is needed of the device loop."""

        def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...

        def remove_reader(self, fd: int) -> None: ...


TAIL_SIZE = 4096
"""Bytes of its standard error that are kept."""

END_TIMEOUT_S = 3.0
"""From SIGTERM to SIGKILL."""

_KILL_TIMEOUT_S = 10.0  # a killed process that is still there waits for a device or a network file system
_START_TIMEOUT_S = 30.0

# setpriv asks for SIGKILL at our death; if we died before it could ask, the shell has another parent by now. Some
# daemons change their user, which makes the kernel forget the request: those have to end when their socket closes.
_TIE = ("setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')


class Daemon:
    """One process, running when this returns.

    Args:
        name: How messages call it.
        argv: Program (a path, or a name to look up) and arguments. It has to stay in the foreground.
        pass_fds: Descriptors it inherits, under the same numbers; they stay the caller's, who may close them at once.
        env: Its whole environment; None for ours.
        package: Debian package that has it, for the message when it is missing.

    Attributes:
        name: As given.
        pid: Its process id.

    Raises:
        HostError: It is not installed, or cannot be started.

    Thread: any. Its standard output and error go to a thread of its own, which also started it: the kernel's request to
    kill a child with its parent goes by the parent's thread. It has a session of its own, so Ctrl-C does not reach it.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        package: str = "",
    ) -> None:
        program = find_program(argv[0], package=package)
        self.name = name
        self.pid = 0
        self._tail = bytearray()
        self._status: int | None = None
        self._asked_to_end = False
        self._is_unwanted = False  # nobody will ever call end()
        self._loop: Loop | None = None
        self._failure: BaseException | None = None
        self._ended = EventFd()
        self._pidfd = -1
        self._pidfd_lock = threading.Lock()
        self._started = threading.Event()
        command = [*_TIE, str(os.getpid()), program, *argv[1:]]
        self._thread = threading.Thread(
            target=self._supervise, args=(command, tuple(pass_fds), env), name=f"run-{name}"[:15], daemon=True
        )
        try:
            self._thread.start()
            if not self._started.wait(_START_TIMEOUT_S):
                raise HostError(f"{name} could not be started within {_START_TIMEOUT_S:g} s")
            if self._failure is not None:
                raise HostError(f"cannot start {name}: {self._failure}") from self._failure
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Leave no process behind, whether it runs by now or will in a moment."""
        self._is_unwanted = True
        self._signal(signal.SIGKILL)
        if self._thread.ident is not None:
            self._thread.join(_KILL_TIMEOUT_S)
        if not self._thread.is_alive():
            self._ended.close()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._status is None

    def watch(self, loop: Loop, on_end: Callable[[], None]) -> None:
        """Call ``on_end`` on the loop's thread, once, when it has ended by itself. At most one watcher."""

        def ended() -> None:
            loop.remove_reader(self._ended.fd)
            if not self._asked_to_end:
                on_end()

        self._loop = loop
        loop.add_reader(self._ended.fd, ended)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; whether it has ended."""
        self._thread.join(timeout_s)
        return not self.is_running

    def last_words(self) -> str:
        """The last line it wrote to its standard output or error; "" if it wrote nothing."""
        lines = bytes(self._tail).decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def tail(self) -> str:
        """The last 4 KiB it wrote to its standard output or error."""
        return bytes(self._tail).decode(errors="replace")

    def end_text(self) -> str:
        """How it ended, to follow its name in a sentence: ``was killed (SIGKILL)``, ``ended with status 1: bad option``."""
        status = self._status
        if status is None:
            return "still runs"
        if status < 0:
            return f"was killed ({signal.Signals(-status).name})"
        words = self.last_words()
        return f"ended with status {status}" + (f": {words}" if words else "")

    def end(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """End it: SIGTERM, SIGKILL after ``timeout_s``; with it go the processes it has started. Twice is harmless.

        Raises:
            HostError: Even SIGKILL did not end it: it waits for the host's kernel.

        Thread: any but the device loop's; blocks.
        """
        if self._ended.fd < 0:
            return
        self._asked_to_end = True
        if self._loop is not None:
            self._loop.remove_reader(self._ended.fd)
        self._signal(signal.SIGTERM)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._signal(signal.SIGKILL)
            self._thread.join(_KILL_TIMEOUT_S)
        if self._thread.is_alive():
            raise HostError(f"{self.name} (process {self.pid}) does not end, although it was killed")
        self._ended.close()

    def kill(self) -> None:
        """SIGKILL, without waiting: it has not done what it should. ``end`` is still to be called. Any thread."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with self._pidfd_lock:
            if self._pidfd >= 0:
                try:
                    signal.pidfd_send_signal(self._pidfd, number)
                except ProcessLookupError:  # reaped this moment
                    pass

    # The supervising thread from here on.

    def _supervise(self, command: list[str], pass_fds: tuple[int, ...], env: Mapping[str, str] | None) -> None:
        output = -1
        try:
            output, theirs = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(output, False)
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, pass_fds=pass_fds, env=env,
                    start_new_session=True,
                )  # fmt: skip
            finally:
                os.close(theirs)
            try:
                self._pidfd = os.pidfd_open(process.pid)
            except OSError:
                process.kill()
                process.wait()
                raise
            self.pid = process.pid
            if self._is_unwanted:  # read after the pidfd is there: else _abandon has found it
                self._signal(signal.SIGKILL)
        except OSError as error:
            self._failure = error
            if output >= 0:
                os.close(output)
            return
        finally:
            self._started.set()
        self._collect(output)
        os.close(output)
        self._reap(process)

    def _collect(self, output: int) -> None:
        """Read what it writes until it has ended."""
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if output in ready and not self._read(output):
                poll.unregister(output)
            if self._pidfd in ready:
                while self._read(output):
                    pass
                return

    def _read(self, output: int) -> bool:
        try:
            data = os.read(output, TAIL_SIZE)
        except BlockingIOError:
            return False
        self._tail += data
        del self._tail[:-TAIL_SIZE]
        return bool(data)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        # Until it is reaped its number is taken, so its group is the one we made.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = process.wait()
        with self._pidfd_lock:
            os.close(self._pidfd)
            self._pidfd = -1
        self._status = status
        self._ended.signal()


def find_program(*candidates: str, package: str = "") -> str:
    """Return the path of the first of these programs that is installed.

    Raises:
        HostError: None is.
    """
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is not None:
            return path
    name = os.path.basename(candidates[0])
    raise HostError(f"{name} is not installed", hint=f"apt-get install {package}" if package else "")
