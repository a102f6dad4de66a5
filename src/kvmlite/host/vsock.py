"""AF_VSOCK sockets of the host: how programs here reach guests whose vsock device the host's kernel serves."""

from __future__ import annotations

import errno
import os
import socket

from kvmlite.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.host.loop import DeviceLoop

_BACKLOG = 128
_UNREACHABLE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENODEV, errno.ETIMEDOUT, errno.EHOSTUNREACH)


class VsockListener:
    """A port of this host that one guest may connect to. Whoever else comes is turned away.

    Args:
        port: The port; by default a free one.

    Attributes:
        port: Its number.

    Raises:
        HostError: The port is taken, or this host's kernel has no vsock.
    """

    def __init__(self, port: int = socket.VMADDR_PORT_ANY) -> None:
        self._socket = _open()
        self._loop: DeviceLoop | None = None
        try:
            self._socket.bind((socket.VMADDR_CID_ANY, port))
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            code = error.errno or 0
            raise HostError(f"cannot listen at vsock port {port}: {os.strerror(code)}", code) from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def serve(self, loop: DeviceLoop, cid: int, accept: Callable[[int], None]) -> None:
        """Hand each connection of the guest ``cid`` to ``accept``: a connected, blocking socket's fd, which it owns.

        Thread: any; ``accept`` runs on the loop's.
        """
        self._loop = loop
        loop.add_reader(self._socket.fileno(), lambda: self._take(cid, accept))

    def _take(self, cid: int, accept: Callable[[int], None]) -> None:
        try:
            connection, (peer, _) = self._socket.accept()
        except OSError:  # it has left already, or the host has no descriptor to spare: it may come again
            return
        if peer != cid:
            connection.close()
            return
        connection.setblocking(True)
        accept(connection.detach())

    def close(self) -> None:
        """Take no more connections; those that were handed out stay. Twice is harmless."""
        if self._socket.fileno() >= 0:
            if self._loop is not None:
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()


def connect(cid: int, port: int, timeout_s: float) -> int:
    """Connect to a port of a guest; a blocking socket's fd, owned by the caller.

    Raises:
        HostError: ECONNREFUSED, ETIMEDOUT and others: nobody listens there, or the guest's driver is not up.
    """
    connection = _open()
    try:
        connection.settimeout(timeout_s)
        connection.connect((cid, port))
        connection.setblocking(True)
    except OSError as error:
        connection.close()
        code = error.errno or errno.ETIMEDOUT  # Python's own timeout has no number
        hint = "nothing listens at that port in the guest, or its vsock driver is not up yet"
        raise HostError(
            f"guest {cid}, port {port}: {os.strerror(code)}", code, hint=hint if code in _UNREACHABLE else ""
        ) from error
    return connection.detach()


def _open() -> socket.socket:
    try:
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        code = error.errno or 0
        raise HostError(
            f"this host's kernel has no vsock sockets: {os.strerror(code)}", code, hint="sudo modprobe vhost_vsock"
        ) from error
