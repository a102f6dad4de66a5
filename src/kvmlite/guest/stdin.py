"""Standard input of a command: bytes given, or a file descriptor read when the guest has room for more."""

from __future__ import annotations

import os
import stat
from collections import deque

from kvmlite.guest import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.host.loop import DeviceLoop


class StdinSender:
    """Sends one command's input as far as the guest's credit goes. Thread: the device loop's.

    Args:
        number: The command's id.
        send: Sends a frame.
        source_fd: Read from this when nothing else is queued; -1 for none. The caller's, and left open.
        on_drained: Called whenever everything queued has been sent, or will never be.
    """

    def __init__(
        self,
        number: int,
        loop: DeviceLoop,
        send: Callable[[bytes], None],
        source_fd: int,
        on_drained: Callable[[], None],
    ) -> None:
        self._number = number
        self._loop = loop
        self._send = send
        self._source_fd = source_fd
        self._source_polls = source_fd >= 0 and _polls(source_fd)
        self._on_drained = on_drained
        self._queue: deque[memoryview] = deque()
        self._credit = 0
        self._is_open = False  # nothing may be sent before STARTED
        self._ends = False  # EOF follows what is queued
        self._is_closed = False  # EOF was sent, or the command wants no more
        self._is_reading = False

    @property
    def is_drained(self) -> bool:
        """Nothing is queued."""
        return not self._queue

    @property
    def is_closed(self) -> bool:
        """No more input can be sent."""
        return self._is_closed

    def queue(self, data: bytes, *, is_last: bool = False) -> None:
        """Send ``data``, and EOF after it if ``is_last``, when there is credit; dropped if the command wants no more."""
        if data and not self._is_closed:
            self._queue.append(memoryview(data))
        self._ends = self._ends or is_last
        self._pump()

    def end(self) -> None:
        """Send EOF after all that is queued."""
        self._ends = True
        self._pump()

    def grant(self, size: int) -> None:
        """The guest takes ``size`` more bytes.

        Raises:
            ProtocolError: More credit than any honest agent has to give.
        """
        self._is_open = True
        self._credit += size
        if self._credit > 1 << 30:
            raise protocol.ProtocolError(f"exec {self._number}: {self._credit} bytes of stdin credit")
        self._pump()

    def close(self) -> None:
        """The command has ended or closed its input: forget the rest."""
        self._is_closed = True
        self._queue.clear()
        self._read_source(False)
        self._on_drained()

    def _pump(self) -> None:
        if not self._is_open:
            return
        while self._credit and self._queue:
            data = self._queue.popleft()
            piece = data[: min(self._credit, protocol.DATA_CHUNK)]
            if len(piece) < len(data):
                self._queue.appendleft(data[len(piece) :])
            self._send_piece(bytes(piece))
        if self._is_closed or self._queue:
            return
        if self._ends:
            self._send(protocol.encode(protocol.STDIN, self._number, b"", protocol.FLAG_EOF))
            self.close()
            return
        self._on_drained()
        if self._source_fd >= 0 and self._source_polls:
            self._read_source(self._credit > 0)
        while self._source_fd >= 0 and self._credit and not self._source_polls and not self._is_closed:
            self._source_readable()

    def _send_piece(self, piece: bytes) -> None:
        self._credit -= len(piece)
        self._send(protocol.encode(protocol.STDIN, self._number, piece))

    def _source_readable(self) -> None:
        """Read once; a source that fails (EIO of a background terminal) ends as one that is at its end."""
        try:
            data = os.read(self._source_fd, min(self._credit, protocol.DATA_CHUNK))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._send_piece(data)
            if not self._credit:
                self._read_source(False)
            return
        self._read_source(False)
        self._source_fd = -1
        self.end()

    def _read_source(self, wanted: bool) -> None:
        if wanted and not self._is_reading:
            self._loop.add_reader(self._source_fd, self._source_readable)
        elif self._is_reading and not wanted:
            self._loop.remove_reader(self._source_fd)
        self._is_reading = wanted


def _polls(fd: int) -> bool:
    """Whether epoll takes ``fd``: regular files and /dev/null are always ready and refused."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)
