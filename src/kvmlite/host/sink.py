"""Where a guest's console output goes: a descriptor that may be slow, and a tail kept for reports."""

from __future__ import annotations

import errno
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.host.eventfd import EventFd

_LOOK_AGAIN_MS = 100
_CHUNK = 4096  # a pipe that polls writable takes this much without waiting (PIPE_BUF)


class ConsoleSink:
    """Writes to ``fd`` in order and remembers the last ``tail_size`` bytes.

    Args:
        fd: Where to write; -1 for nowhere. The caller's.
        cancel: Once readable, output is only written where that needs no waiting; the rest is dropped.
        on_broken: Called once, with the error, when nobody can read any more (EPIPE, a full disk).

    Thread: one at a time; the caller sees to that. Blocks while the reader is slow, until cancelled or until the
    deadline of ``give_up_at``, which any thread may set.
    """

    def __init__(
        self, fd: int, cancel: EventFd, on_broken: Callable[[OSError], None], *, tail_size: int = 65536
    ) -> None:
        self._fd = fd
        self._cancel = cancel
        self._on_broken = on_broken
        self._tail = bytearray()
        self._tail_size = tail_size
        self._deadline = float("inf")

    def give_up_at(self, deadline: float) -> None:
        """Wait for the reader no longer than this (``time.monotonic``), seen within 0.1 s."""
        self._deadline = deadline

    @property
    def fd(self) -> int:
        """Where it writes; -1 for nowhere, or not any more."""
        return self._fd

    def is_writable(self) -> bool:
        """Whether 4096 bytes could be written now without waiting."""
        if self._fd < 0:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(0))

    @property
    def tail(self) -> bytes:
        """The last bytes written."""
        return bytes(self._tail[-self._tail_size :])

    def __call__(self, data: bytes) -> None:
        self._tail += data
        if len(self._tail) > 2 * self._tail_size:
            del self._tail[: -self._tail_size]
        view = memoryview(data)
        while view and self._fd >= 0 and self._wait_writable():
            try:
                view = view[os.write(self._fd, view[:_CHUNK]) :]
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    self._fd = -1
                    self._on_broken(error)

    def _wait_writable(self) -> bool:
        """Wait for room; False when given up and there is none."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.register(self._cancel.fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(_LOOK_AGAIN_MS)}
            if ready or time.monotonic() >= self._deadline:
                return self._fd in ready
