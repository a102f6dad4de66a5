"""timerfd(2) with an owner: a clock that a poll can wait for."""

from __future__ import annotations

import os

from kvmlite._native import ffi, lib
from kvmlite.errors import HostError


class TimerFd:
    """A non-blocking, close-on-exec timer of CLOCK_MONOTONIC; C arms it (``timer.h``).

    Raises:
        HostError: The host has no more descriptors.
    """

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd: int = lib.timerfd_create(lib.CLOCK_MONOTONIC, lib.TFD_CLOEXEC | lib.TFD_NONBLOCK)
        if self.fd < 0:
            raise HostError("cannot make a timer", ffi.errno)

    def close(self) -> None:
        """Close the descriptor; twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
