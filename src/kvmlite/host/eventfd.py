"""eventfd(2) with an owner."""

from __future__ import annotations

import os


class EventFd:
    """A non-blocking, close-on-exec eventfd. Any thread may signal and drain; ``close`` once."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signal(self) -> None:
        """Make it readable."""
        os.eventfd_write(self.fd, 1)

    def drain(self) -> bool:
        """Make it unreadable; whether it was readable."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the descriptor; twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
