"""A coarse clock on the device loop: it ticks only while somebody waits for something that may never come."""

from __future__ import annotations

import ctypes
import os
import time
from typing import TYPE_CHECKING, Protocol

from kvmlite.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_NS = 1_000_000_000


class TickLoop(Protocol):
    """The part of the device loop that the clock needs."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...
    def remove_reader(self, fd: int) -> None: ...


class Clock:
    """Calls ``expire`` functions each tick until they say that nothing waits.

    Owns a timerfd from the first ``add`` to ``close``.

    Args:
        loop: Where the ticks run.
        tick_s: Time between ticks, in seconds.

    Thread: the device loop.
    """

    def __init__(self, loop: TickLoop, tick_s: float = 0.25) -> None:
        self._loop = loop
        self._tick_ns = int(tick_s * _NS)
        self._waiting: dict[Callable[[float], bool], None] = {}
        self._fd = -1

    def add(self, expire: Callable[[float], bool]) -> None:
        """Call ``expire(time.monotonic())`` each tick while it returns True."""
        if not self._waiting:
            self._set(self._tick_ns)
        self._waiting[expire] = None

    def _tick(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        now = time.monotonic()
        for expire in list(self._waiting):
            if not expire(now):
                self._waiting.pop(expire, None)
        if not self._waiting:
            self._set(0)

    def _set(self, interval_ns: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if self._fd < 0:
            fd = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
            if fd < 0:
                raise HostError(f"timerfd_create: {os.strerror(ctypes.get_errno())}", ctypes.get_errno())
            self._fd = fd
            self._loop.add_reader(fd, self._tick)
        # struct itimerspec: interval, then first expiry, each as seconds and nanoseconds
        times = (ctypes.c_long * 4)(*(2 * divmod(interval_ns, _NS)))
        if libc.timerfd_settime(self._fd, 0, times, None) < 0:
            raise HostError(f"timerfd_settime: {os.strerror(ctypes.get_errno())}", ctypes.get_errno())

    def close(self) -> None:
        """Stop ticking and close the timer; it starts anew with the next ``add``."""
        self._waiting.clear()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
