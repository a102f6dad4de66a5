"""Where the output of a command goes: a file descriptor, a callback or memory.

A sink acknowledges bytes once they are out of its hands; only then does the guest get credit for more, so a slow
reader on the host slows the command down and nothing piles up in between. All run on the device loop's thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmlite.host.loop import DeviceLoop

    class Sink(Protocol):
        """Takes the bytes of one output stream."""

        @property
        def is_drained(self) -> bool:
            """Nothing is waiting to be written."""

        def write(self, data: memoryview) -> int:
            """Take ``data``, valid during the call only; bytes of it that are dealt with already."""

        def close(self) -> None:
            """The stream has ended and everything is written, or is given up."""


_GATED_CHUNK = 4096  # a descriptor that polls writable takes this much (PIPE_BUF) without blocking


class Capture:
    """Keeps output in memory.

    Args:
        limit: Bytes to keep; what comes after is read and dropped, so the command is not held up.

    Attributes:
        is_truncated: Something was dropped.
    """

    is_drained = True

    def __init__(self, limit: int = 64 << 20) -> None:
        self._limit = limit
        self._data = bytearray()
        self.is_truncated = False

    @property
    def data(self) -> bytes:
        """What has come so far."""
        return bytes(self._data)

    def write(self, data: memoryview) -> int:
        """Keep ``data`` as far as the limit goes."""
        room = self._limit - len(self._data)
        self._data += data[:room]
        self.is_truncated = self.is_truncated or len(data) > room
        return len(data)

    def close(self) -> None:
        """Nothing to do."""


class CallbackSink:
    """Hands each piece of output to a function, on the loop's thread; it must not block."""

    is_drained = True

    def __init__(self, function: Callable[[bytes], object]) -> None:
        self._function = function

    def write(self, data: memoryview) -> int:
        """Call the function."""
        self._function(bytes(data))
        return len(data)

    def close(self) -> None:
        """Nothing to do."""


class FdSink:
    """Writes to a file descriptor of the caller's, without ever blocking the loop or changing its flags.

    A pipe or terminal is opened a second time, because O_NONBLOCK belongs to the open file, which the shell that
    started us shares; a socket takes MSG_DONTWAIT; a regular file does not block. Where none of this is possible,
    small pieces are written whenever poll says that there is room.

    Args:
        fd: The caller's; must stay open until the command has ended.
        on_written: Called with the number of bytes that went out later than ``write`` returned.
        on_failed: Called once with the error if nothing can be written any more (EPIPE, ENOSPC); from then on
            everything is dropped.
    """

    def __init__(
        self, fd: int, loop: DeviceLoop, on_written: Callable[[int], None], on_failed: Callable[[OSError], None]
    ) -> None:
        self._loop = loop
        self._on_written = on_written
        self._on_failed = on_failed
        self._pending: deque[memoryview] = deque()
        self._is_waiting = False
        self._is_failed = False
        self._is_gated = False
        self._fd = fd
        self._close_own: Callable[[], None] | None = None
        self._write: Callable[[int, memoryview], int] = os.write
        self._prepare(fd)

    @property
    def is_drained(self) -> bool:
        """Nothing is waiting to be written."""
        return not self._pending

    def write(self, data: memoryview) -> int:
        """Write what can be written now and keep a copy of the rest."""
        if self._is_failed:
            return len(data)
        done = 0 if self._pending or self._is_gated else self._try_write(data)
        if done < len(data) and not self._is_failed:
            self._pending.append(memoryview(bytes(data[done:])))
            self._wait_writable(True)
        return done

    def close(self) -> None:
        """Give up what is pending and close what was opened here."""
        self._wait_writable(False)
        self._pending.clear()
        close_own, self._close_own = self._close_own, None
        if close_own:
            close_own()

    def _prepare(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            import socket

            own = socket.socket(fileno=os.dup(fd))
            self._write = lambda _, data: own.send(data, socket.MSG_DONTWAIT)
            self._fd = own.fileno()
            self._close_own = own.close
        elif stat.S_ISFIFO(mode) or os.isatty(fd):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                own_fd = os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:  # a terminal of another user, a pipe without a reader, no /proc
                self._is_gated = True
                return
            self._fd = own_fd
            self._close_own = lambda: os.close(own_fd)

    def _try_write(self, data: memoryview) -> int:
        """Write until all is gone or there is no room; bytes written. A failure is reported and ends the sink."""
        done = 0
        limit = _GATED_CHUNK if self._is_gated else len(data)
        try:
            while done < len(data):
                done += self._write(self._fd, data[done : done + limit])
                if self._is_gated:
                    break
        except BlockingIOError:
            pass  # no room: the rest waits
        except OSError as error:
            self._fail(error)
        return done

    def _fail(self, error: OSError) -> None:
        self._is_failed = True
        self._pending.clear()
        self._wait_writable(False)
        self._on_failed(error)

    def _writable(self) -> None:
        written = 0
        while self._pending:
            data = self._pending[0]
            count = self._try_write(data)
            written += count
            if self._is_failed:
                return
            if count < len(data):
                self._pending[0] = data[count:]
                break
            self._pending.popleft()
            if self._is_gated:
                break
        if not self._pending:
            self._wait_writable(False)
        self._on_written(written)

    def _wait_writable(self, wanted: bool) -> None:
        if wanted and not self._is_waiting:
            self._loop.add_writer(self._fd, self._writable)
        elif self._is_waiting and not wanted:
            self._loop.remove_writer(self._fd)
        self._is_waiting = wanted


def is_broken_pipe(error: OSError) -> bool:
    """Whether the reader has simply gone away, as ``head`` does: the end of the stream, not a failure of ours."""
    return error.errno in (errno.EPIPE, errno.ECONNRESET)
