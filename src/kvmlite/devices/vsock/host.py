"""The host's side: who listens for the guest, and how host programs reach it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from kvmlite.devices.vsock.clock import Clock
from kvmlite.devices.vsock.unix_listener import UnixListener
from kvmlite.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.devices.vsock.endpoint import Loop


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return (the device's end, nonblocking; the other end, blocking) of a stream."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    return ours, theirs


class HostSide:
    """Listeners of this process by port, then Unix sockets by path.

    Args:
        loop: The device loop.
        uds_path: Where host programs connect; a guest's connection to port N goes to ``<uds_path>_<N>``. None: neither.

    Raises:
        ConfigError: Somebody else listens at ``uds_path``.
        HostError: The host refuses to listen there.

    Thread: the device loop, but for ``listen`` (any).
    """

    def __init__(self, loop: Loop, uds_path: str | None) -> None:
        self.loop = loop
        self.clock = Clock(loop)
        self._uds_path = uds_path
        self._listeners: dict[int, Callable[[int], None]] = {}
        self.unix_listener = None if uds_path is None else UnixListener(uds_path, loop, self.clock)

    def listen(self, port: int, accept: Callable[[int], None]) -> None:
        """Give the guest's connections to ``port`` to ``accept``; one listener per port."""
        if self._listeners.setdefault(port, accept) is not accept:
            raise ConfigError(f"vsock: port {port} has a listener already")

    def reach(self, port: int) -> socket.socket | None:
        """Return a nonblocking socket joined to whoever listens at ``port``; None if nobody does."""
        accept = self._listeners.get(port)
        if accept is not None:
            return self._reach_listener(accept)
        if self._uds_path is not None:
            return _reach_path(f"{self._uds_path}_{port}")
        return None

    def _reach_listener(self, accept: Callable[[int], None]) -> socket.socket | None:
        try:
            ours, theirs = socket_pair()
        except OSError:  # EMFILE: the guest is refused, the machine goes on
            return None
        # Later, not now: a listener that talks to the device at once must find it between two packets.
        try:
            self.loop.post(lambda: accept(theirs.detach()))
        except StateError:  # the loop is stopping
            ours.close()
            theirs.close()
            return None
        return ours

    def close(self) -> None:
        """Close the Unix socket and the clock."""
        if self.unix_listener is not None:
            self.unix_listener.close()
        self.clock.close()


def _reach_path(path: str) -> socket.socket | None:
    try:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError:  # EMFILE
        return None
    try:
        client.connect(path)
    except OSError:  # ENOENT, ECONNREFUSED, EAGAIN (backlog full): nobody there for the guest
        client.close()
        return None
    return client
