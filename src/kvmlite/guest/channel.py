"""The byte stream between host and agent: frames in, frames out, on the device loop; and its end.

The stream may be anything full-duplex with a file descriptor: a socket pair behind virtio-vsock, a virtio-console
port, a serial line.
"""

from __future__ import annotations

import os
from collections import deque

from kvmlite.errors import KvmliteError
from kvmlite.guest.protocol import FrameReader, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.host.loop import DeviceLoop

_READS_PER_CALLBACK = 8
_UNSENT_MAX = 64 << 20


class ChannelLost(KvmliteError):
    """The channel to the agent ended, or what came over it made no sense; nothing is known of what still ran."""


class Channel:
    """Frames over one file descriptor.

    Args:
        fd: The stream; owned by the channel from now on, and made non-blocking.
        loop: The loop whose thread runs the callbacks.
        on_frame: Called with (type, flags, id, payload) of each frame; the payload is valid only during the call.
            It may raise :class:`ProtocolError`, which ends the channel.
        on_lost: Called once, when the channel ends, with the reason.

    Thread: the loop's, except ``__init__``.
    """

    def __init__(
        self,
        fd: int,
        loop: DeviceLoop,
        on_frame: Callable[[int, int, int, memoryview], None],
        on_lost: Callable[[ChannelLost], None],
    ) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._loop = loop
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._unsent: deque[memoryview] = deque()
        self._unsent_size = 0
        self._waits_writable = False
        self._may_send = False

    def open(self) -> None:
        """Begin to read."""
        self._loop.add_reader(self._fd, self._readable)

    def begin_sending(self) -> None:
        """The agent listens: send what has been kept, and everything after it at once.

        Before the agent's first word nothing is sent: a serial port forgets what came before it was opened.
        """
        self._may_send = True
        self._flush()

    def send(self, data: bytes) -> None:
        """Send whole frames, in order; what the stream does not take now is kept. Nothing happens after the end."""
        if self._fd < 0:
            return
        self._unsent.append(memoryview(data))
        self._unsent_size += len(data)
        if self._may_send and not self._waits_writable:
            self._flush()
        if self._unsent_size > _UNSENT_MAX:
            self.end(f"the agent does not read: {self._unsent_size} bytes unsent")

    def end(self, reason: str) -> None:
        """Close the stream and tell ``on_lost``; the second time nothing happens."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        os.close(fd)
        self._unsent.clear()
        self._on_lost(ChannelLost(reason))

    def _readable(self) -> None:
        for _ in range(_READS_PER_CALLBACK):
            if self._fd < 0 or not self._read_once():
                return

    def _read_once(self) -> bool:
        """Read and dispatch; False when there is nothing more for now."""
        space = self._reader.space()
        try:
            count = os.readv(self._fd, [space])
        except BlockingIOError:
            return False
        except OSError as error:  # ECONNRESET, EIO of a port that was unplugged
            self.end(f"reading from the agent: {error.strerror}")
            return False
        if count == 0:
            self.end("the agent closed the channel")
            return False
        self._reader.received(count)
        try:
            for kind, flags, number, payload in self._reader.frames():
                self._on_frame(kind, flags, number, payload)
                if self._fd < 0:
                    return False
        except ProtocolError as error:
            self.end(f"protocol error: {error}")
            return False
        return count == len(space)

    def _flush(self) -> None:
        while self._unsent and self._fd >= 0:
            try:
                count = os.write(self._fd, self._unsent[0])
            except BlockingIOError:
                break
            except OSError as error:
                self.end(f"writing to the agent: {error.strerror}")
                return
            self._unsent_size -= count
            rest = self._unsent[0][count:]
            if rest:
                self._unsent[0] = rest
            else:
                self._unsent.popleft()
        self._set_waits_writable(bool(self._unsent))

    def _set_waits_writable(self, wanted: bool) -> None:
        if wanted and not self._waits_writable:
            self._loop.add_writer(self._fd, self._flush)
        elif self._waits_writable and not wanted:
            self._loop.remove_writer(self._fd)
        self._waits_writable = wanted
