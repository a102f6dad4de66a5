"""Notice that a TAP interface was removed under its descriptor, for who never reads from it."""

from __future__ import annotations

import fcntl

from kvmlite.abi.tun import IFNAMSIZ, TUNGETIFF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.host.loop import DeviceLoop

RTMGRP_LINK = 1


class LinkWatch:
    """Looks at a TAP's descriptor whenever the kernel tells of a change to an interface of this network namespace.

    Args:
        fd: The TAP's; its owner's.
        loop: Where to look.
        on_gone: Called once, on the loop's thread, when the interface is gone.

    Raises:
        OSError: The kernel does not tell.

    Thread: any.
    """

    def __init__(self, fd: int, loop: DeviceLoop, on_gone: Callable[[], None]) -> None:
        import socket

        self._fd = fd
        self._loop = loop
        self._on_gone = on_gone
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        try:
            self._socket.bind((0, RTMGRP_LINK))
            loop.add_reader(self._socket.fileno(), self._look)
        except BaseException:
            self._socket.close()
            raise

    def _look(self) -> None:
        self._drain()
        try:
            fcntl.ioctl(self._fd, TUNGETIFF, bytearray(IFNAMSIZ + 24))
        except OSError:
            self._loop.remove_reader(self._socket.fileno())
            self._on_gone()

    def _drain(self) -> None:
        try:
            while self._socket.recv(65536):
                continue
        except OSError:  # nothing more; or more than it could keep, which is a change, too
            pass

    def close(self) -> None:
        """Look no more."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
