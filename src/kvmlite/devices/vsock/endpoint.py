"""A connection joined to its host socket: bytes move here, rules are in :mod:`.connection`."""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, Protocol

from kvmlite.abi.virtio_vsock import (
    VIRTIO_VSOCK_SHUTDOWN_BOTH,
    VIRTIO_VSOCK_SHUTDOWN_RCV,
    VIRTIO_VSOCK_SHUTDOWN_SEND,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmlite.devices.vsock.connection import Connection

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
MAX_IOVECS = 1024
"""``UIO_MAXIOV``: buffers one ``sendmsg`` or ``recvmsg`` takes."""

WOULD_BLOCK = -1


class Poller(Protocol):
    """The part of the device loop that watches host sockets."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...
    def remove_reader(self, fd: int) -> None: ...
    def add_writer(self, fd: int, callback: Callable[[], None]) -> None: ...
    def remove_writer(self, fd: int) -> None: ...


class Loop(Poller, Protocol):
    """The part of the device loop that the device needs."""

    def post(self, function: Callable[[], object]) -> None: ...
    def call(self, function: Callable[[], object], timeout_s: float = ...) -> object: ...


class Endpoint:
    """One connection of the guest with the host socket at its other end.

    Owns the socket (nonblocking, stream) and up to ``connection.buffer_size`` bytes the host has not taken yet.

    Args:
        connection: Protocol state.
        host_socket: Its other end.
        poller: Who watches the socket.
        on_readable: Called with the endpoint when the host sent something or left.
        on_writable: Called with the endpoint when the host has room again and bytes wait for it.

    Thread: the device loop.
    """

    __slots__ = (
        "_is_reading",
        "_is_writing",
        "_on_readable",
        "_on_writable",
        "_outbox",
        "_poller",
        "_socket",
        "connection",
        "is_stalled",
    )

    def __init__(
        self,
        connection: Connection,
        host_socket: socket.socket,
        poller: Poller,
        on_readable: Callable[[Endpoint], None],
        on_writable: Callable[[Endpoint], None],
    ) -> None:
        self.connection = connection
        self._socket = host_socket
        self._poller = poller
        self._on_readable = on_readable
        self._on_writable = on_writable
        self._outbox = bytearray()
        self._is_reading = False
        self._is_writing = False
        self.is_stalled = False  # the guest has no room: reading goes on when it says that it has

    @property
    def key(self) -> tuple[int, int]:
        """Return (host port, guest port): what names a connection, as both CIDs are fixed."""
        return self.connection.host_port, self.connection.guest_port

    @property
    def may_read(self) -> bool:
        """Whether host bytes may still go to the guest."""
        connection = self.connection
        return (
            connection.is_open
            and not connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV
            and not connection.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND
        )

    @property
    def has_unsent(self) -> bool:
        """Whether bytes of the guest wait for the host."""
        return bool(self._outbox)

    def send(self, views: Sequence[memoryview]) -> None:
        """Pass guest bytes on to the host; keep a copy of what it does not take now.

        Args:
            views: The payload, in guest memory; not used after the call returns.
        """
        sent = 0
        if not self._outbox:
            sent = self._write(views[:MAX_IOVECS])
            if sent == WOULD_BLOCK:
                sent = 0
        skip = sent
        for view in views:
            if skip >= len(view):
                skip -= len(view)
                continue
            self._outbox += view[skip:]
            skip = 0
        self.connection.forward(sent)
        if self._outbox:
            self._watch_outbox()

    def flush(self) -> None:
        """Write kept bytes as far as the host takes them; then pass on the guest's end of stream."""
        while self._outbox:
            with memoryview(self._outbox) as view:
                sent = self._write([view])
            if sent == WOULD_BLOCK:
                break
            del self._outbox[:sent]
            self.connection.forward(sent)
        self._watch_outbox()
        if not self._outbox and self.connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND:
            self._shutdown(socket.SHUT_WR)

    def _write(self, views: Sequence[memoryview]) -> int:
        """Return bytes written, or WOULD_BLOCK; a host that left takes everything and reads nothing."""
        if not self.connection.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV:
            try:
                return self._socket.sendmsg(views, (), _SEND_FLAGS)
            except BlockingIOError:
                return WOULD_BLOCK
            except OSError:  # EPIPE, ECONNRESET, ...: whatever it is, this host will not read
                self.connection.shut_host(VIRTIO_VSOCK_SHUTDOWN_RCV)
        return sum(map(len, views))

    def receive_into(self, views: Sequence[memoryview]) -> int:
        """Read host bytes into guest memory.

        Returns:
            Bytes read; 0 at the end of the stream (``connection.host_shutdown`` says so then); or WOULD_BLOCK.
        """
        try:
            size = self._socket.recvmsg_into(views, 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return WOULD_BLOCK
        except OSError:  # ECONNRESET: the host closed without having read everything
            self.connection.shut_host(VIRTIO_VSOCK_SHUTDOWN_BOTH)
            return 0
        if size == 0:
            left = self._has_hung_up()
            self.connection.shut_host(VIRTIO_VSOCK_SHUTDOWN_BOTH if left else VIRTIO_VSOCK_SHUTDOWN_SEND)
        return size

    def _has_hung_up(self) -> bool:
        # shutdown(SHUT_WR) and close() of the other end both read as end of stream; only POLLHUP tells which.
        poll = select.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))

    def close_receiver(self) -> None:
        """Pass on that the guest will not read any more: the host's writes fail from now on."""
        self.pause_reading()
        self._shutdown(socket.SHUT_RD)

    def _shutdown(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:  # ENOTCONN: the host has closed its end already
            self.connection.shut_host(VIRTIO_VSOCK_SHUTDOWN_RCV)

    def resume_reading(self) -> None:
        """Watch the socket for host bytes."""
        if not self._is_reading:
            self._is_reading = True
            self._poller.add_reader(self._socket.fileno(), self._readable)

    def pause_reading(self) -> None:
        """Take the socket out of the poll set: there is nowhere to put host bytes."""
        if self._is_reading:
            self._is_reading = False
            self._poller.remove_reader(self._socket.fileno())

    def _watch_outbox(self) -> None:
        wanted = bool(self._outbox)
        if wanted and not self._is_writing:
            self._poller.add_writer(self._socket.fileno(), self._writable)
        elif self._is_writing and not wanted:
            self._poller.remove_writer(self._socket.fileno())
        self._is_writing = wanted

    def _readable(self) -> None:
        self._on_readable(self)

    def _writable(self) -> None:
        self._on_writable(self)

    def close(self) -> None:
        """Close the host socket: its other end reads end of stream. Twice is harmless."""
        self.pause_reading()
        self.connection.forward(len(self._outbox))
        self._outbox.clear()
        self._watch_outbox()
        self._socket.close()
