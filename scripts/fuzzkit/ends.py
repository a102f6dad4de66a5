"""The host's ends of a device's connections, and what the host may do with them at any time."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuzzkit.target import Op


class Ends:
    """Sockets whose other ends are the device's. A step whose connection is not there does nothing."""

    def __init__(self) -> None:
        self._ends: list[socket.socket] = []

    def add(self, end: socket.socket) -> None:
        """Take a socket over."""
        end.setblocking(False)
        self._ends.append(end)

    def choose(self, op: Op) -> socket.socket | None:
        """The one that a step means; None if there is none."""
        return self._ends[op.value % len(self._ends)] if self._ends else None

    def write(self, op: Op) -> None:
        """Write as much as goes."""
        if end := self.choose(op):
            try:
                end.send(bytes(op.size % 9000), socket.MSG_NOSIGNAL)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                return

    def read(self, op: Op) -> None:
        """Take what there is."""
        if end := self.choose(op):
            try:
                end.recv(1 << 18)
            except (BlockingIOError, ConnectionResetError):
                return

    def close(self, op: Op) -> None:
        """Close it."""
        if end := self.choose(op):
            self._ends.remove(end)
            end.close()

    def close_all(self) -> None:
        """At the end of a case."""
        for end in self._ends:
            end.close()
        self._ends.clear()
