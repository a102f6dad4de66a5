"""The table of connections: packets of the guest in, host sockets opened, fed and closed."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

from kvmlite.abi.virtio_vsock import (
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_SHUTDOWN_BOTH,
    VIRTIO_VSOCK_SHUTDOWN_RCV,
    VIRTIO_VSOCK_SHUTDOWN_SEND,
    VIRTIO_VSOCK_TYPE_STREAM,
    VMADDR_CID_HOST,
)
from kvmlite.devices.vsock.connection import Connection, Verdict
from kvmlite.devices.vsock.endpoint import Endpoint
from kvmlite.devices.vsock.packet import HEADER_SIZE, Header
from kvmlite.devices.vsock.rx import RxPump
from kvmlite.errors import StateError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kvmlite.devices.vsock.counters import Counters
    from kvmlite.devices.vsock.host import HostSide
    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import DescriptorChain, Virtqueue

MAX_CONNECTIONS = 1024  # and a quarter of the file descriptors this process may have
ANSWER_TIMEOUT_S = 5.0  # for the guest to answer a REQUEST, or a complete SHUTDOWN
BUFFER_SIZE = 256 * 1024
SMALL_BUFFER_SIZE = 32 * 1024  # once there are many: all together stay below 64 MiB
MANY_CONNECTIONS = 128
FIRST_HOST_PORT = 1 << 30  # ports of connections that the host opens
_TX_BUDGET = 256  # packets taken in one visit


class Request:
    """A connection the host asked for and the guest has not answered.

    Args:
        on_accepted: Called with the host's port when the guest accepts.
        on_refused: Called when it does not, or not in time, or the device is reset. One of the two is called, once.
        timeout_s: How long the guest may take, in seconds.
    """

    __slots__ = ("deadline", "endpoint", "on_accepted", "on_refused")

    def __init__(
        self,
        on_accepted: Callable[[int], None],
        on_refused: Callable[[], None],
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.on_accepted = on_accepted
        self.on_refused = on_refused
        self.deadline = time.monotonic() + timeout_s
        self.endpoint: Endpoint | None = None


class Multiplexer:
    """All connections between one activation of the device and its reset.

    Args:
        guest_cid: Address of the guest.
        queues: The rx queue (to the guest) and the tx queue (from it).
        interrupt: Tells the driver of used buffers, once per visit.
        host: Who is there for the guest; its loop watches host sockets, its clock ends what takes too long.
        counters: Totals to keep.

    Thread: the device loop.
    """

    def __init__(
        self,
        guest_cid: int,
        queues: tuple[Virtqueue, Virtqueue],
        interrupt: Interrupt,
        host: HostSide,
        counters: Counters,
    ) -> None:
        self._guest_cid = guest_cid
        self._rx_queue, self._tx = queues
        self._interrupt = interrupt
        self._host = host
        self._loop = host.loop
        self._counters = counters
        self._rx = RxPump(self._rx_queue, counters, self._host_ended)
        self._endpoints: dict[tuple[int, int], Endpoint] = {}
        self._requests: dict[tuple[int, int], Request] = {}
        self._leaving: dict[Endpoint, float] = {}  # host gone: deadlines for the RST, oldest first
        self._lingering: set[Endpoint] = set()  # guest gone, its last bytes not yet with the host
        self._next_host_port = FIRST_HOST_PORT
        self._has_used_tx = False
        self._is_closed = False
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.capacity = min(MAX_CONNECTIONS, soft_limit // 4) if soft_limit > 0 else MAX_CONNECTIONS

    def __len__(self) -> int:
        """Return the number of connections."""
        return len(self._endpoints) + len(self._lingering)

    @property
    def unsent_bytes(self) -> int:
        """Guest bytes held because hosts do not read; any thread."""
        endpoints = [*self._endpoints.values(), *self._lingering]
        return sum(endpoint.connection.unforwarded for endpoint in endpoints)

    # ---- visits: each ends with at most one interrupt ----

    def kick_rx(self) -> None:
        """Go on towards the guest: the driver added buffers."""
        was_full = self._rx.is_full
        self._finish_visit()
        if was_full:
            self.kick_tx()

    def kick_tx(self) -> None:
        """Take packets of the guest until there are no more, the budget ends, or resets wait for rx buffers."""
        if self._is_closed:
            return
        for _ in range(_TX_BUDGET):
            if self._rx.is_full:
                break
            chain = self._tx.pop()
            if chain is None:
                break
            self._take_packet(chain)
            self._tx.add_used(chain.head_index, 0)
            self._has_used_tx = True
        else:
            self._continue(self.kick_tx)
        self._finish_visit()

    def _host_readable(self, endpoint: Endpoint) -> None:
        self._rx.drain(endpoint)
        self._finish_visit()

    def _host_writable(self, endpoint: Endpoint) -> None:
        endpoint.flush()
        self._settle(endpoint)
        self._finish_visit()

    def _finish_visit(self) -> None:
        if self._is_closed:
            return
        if self._rx.run():
            self._continue(self._finish_visit)
        has_news = self._rx.has_used and self._rx_queue.needs_interrupt()
        if self._has_used_tx:
            has_news = self._tx.needs_interrupt() or has_news
        self._rx.has_used = self._has_used_tx = False
        if has_news:
            self._interrupt.raise_queue()

    def _continue(self, visit: Callable[[], None]) -> None:
        """Let others on the loop have their turn first."""
        try:
            self._host.loop.post(visit)
        except StateError:  # the loop is stopping and with it the machine: nobody waits for the rest
            return

    # ---- from the guest ----

    def _take_packet(self, chain: DescriptorChain) -> None:
        self._counters.packets_in += 1
        if chain.readable_size < HEADER_SIZE:
            self._counters.malformed += 1
            return
        header = Header.unpack(chain.read(0, HEADER_SIZE))
        if header.src_cid != self._guest_cid:
            self._counters.malformed += 1  # nobody there to answer
            return
        if header.dst_cid != VMADDR_CID_HOST or header.type != VIRTIO_VSOCK_TYPE_STREAM:
            self._refuse(header)
            return
        endpoint = self._endpoints.get((header.dst_port, header.src_port))
        if endpoint is None:
            if header.op == VIRTIO_VSOCK_OP_REQUEST:
                self._open_for_guest(header)
            else:
                self._refuse(header)
        elif header.size > chain.readable_size - HEADER_SIZE:
            self._counters.malformed += 1
            self._reset(endpoint)
        else:
            self._dispatch(endpoint, header, chain)

    def _refuse(self, header: Header) -> None:
        if header.op != VIRTIO_VSOCK_OP_RST:  # never answer a reset with a reset
            self._rx.owe_reset(header.reset())

    def _open_for_guest(self, header: Header) -> None:
        host_socket = self._host.reach(header.dst_port) if self._has_room() else None
        if host_socket is None:
            self._refuse(header)
            return
        connection = Connection.from_request(header, self._buffer_size())
        endpoint = self._add(connection, host_socket)
        self._counters.connections_opened += 1
        self._rx.owe_control(endpoint)
        endpoint.resume_reading()

    def _dispatch(self, endpoint: Endpoint, header: Header, chain: DescriptorChain) -> None:
        connection = endpoint.connection
        verdict = connection.receive(header)
        if verdict is Verdict.DATA:
            self._counters.bytes_in += header.size
            endpoint.send(chain.readable_views(HEADER_SIZE, header.size))
        elif verdict is Verdict.DISCARD:
            connection.forward(header.size)
        elif verdict is Verdict.SHUTDOWN:
            if connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV:
                endpoint.close_receiver()
            if connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND:
                endpoint.flush()
        elif verdict is Verdict.ACCEPTED:
            self._accepted(endpoint)
        elif verdict is Verdict.GONE:
            self._counters.resets_in += 1
            self._drop(endpoint)
            return
        elif verdict is Verdict.RESET:
            self._reset(endpoint)
            return
        self._settle(endpoint)

    def _settle(self, endpoint: Endpoint) -> None:
        """Do what follows from the state an event left a connection in."""
        connection = endpoint.connection
        if endpoint in self._lingering:
            if not endpoint.has_unsent:
                self._lingering.discard(endpoint)
                endpoint.close()
            return
        if connection.guest_shutdown == VIRTIO_VSOCK_SHUTDOWN_BOTH:
            self._disconnect(endpoint)
            return
        self._host_ended(endpoint)
        if endpoint.is_stalled and connection.credit:
            endpoint.is_stalled = False
            self._rx.owe_data(endpoint)
        if connection.has_control:
            self._rx.owe_control(endpoint)

    def _disconnect(self, endpoint: Endpoint) -> None:
        """Complete a clean disconnect: RST at once; bytes the host has not taken may take their time."""
        if not endpoint.has_unsent:
            self._reset(endpoint)
            return
        self._rx.owe_reset(endpoint.connection.reset())
        self._remove(endpoint)
        self._lingering.add(endpoint)

    # ---- from the host ----

    def open_for_host(self, guest_port: int, host_socket: socket.socket, request: Request) -> None:
        """Ask the guest to accept a connection; the outcome reaches ``request``.

        Args:
            guest_port: Where the guest listens.
            host_socket: The host's side, nonblocking; owned from now on.
            request: Whom to tell.
        """
        if not self._has_room():
            host_socket.close()
            request.on_refused()
            return
        connection = Connection(self._guest_cid, self._free_host_port(guest_port), guest_port, self._buffer_size())
        request.endpoint = self._add(connection, host_socket)
        self._requests[request.endpoint.key] = request
        self._host.clock.add(self.expire)
        self._rx.owe_control(request.endpoint)
        self._finish_visit()

    def cancel(self, request: Request) -> None:
        """Give up a request; nothing happens if it has been answered."""
        endpoint = request.endpoint
        if endpoint is not None and self._requests.get(endpoint.key) is request:
            self._reset(endpoint)
            self._finish_visit()

    def _free_host_port(self, guest_port: int) -> int:
        while True:  # at most `capacity` rounds
            port = self._next_host_port
            self._next_host_port = FIRST_HOST_PORT | (port + 1) % FIRST_HOST_PORT
            if (port, guest_port) not in self._endpoints:
                return port

    def _accepted(self, endpoint: Endpoint) -> None:
        self._counters.connections_opened += 1
        self._requests.pop(endpoint.key).on_accepted(endpoint.connection.host_port)
        endpoint.resume_reading()

    def _host_ended(self, endpoint: Endpoint) -> None:
        """Close the socket if the host has left for good; the guest's RST ends the connection."""
        if endpoint.connection.host_shutdown != VIRTIO_VSOCK_SHUTDOWN_BOTH:
            return
        if endpoint not in self._leaving:
            endpoint.close()
            self._leaving[endpoint] = time.monotonic() + ANSWER_TIMEOUT_S
            self._host.clock.add(self.expire)

    # ---- the table ----

    def _has_room(self) -> bool:
        if len(self) >= self.capacity and self._leaving:
            self._reset(next(iter(self._leaving)))
        return len(self) < self.capacity

    def _buffer_size(self) -> int:
        return BUFFER_SIZE if len(self) < MANY_CONNECTIONS else SMALL_BUFFER_SIZE

    def _add(self, connection: Connection, host_socket: socket.socket) -> Endpoint:
        endpoint = Endpoint(connection, host_socket, self._loop, self._host_readable, self._host_writable)
        self._endpoints[endpoint.key] = endpoint
        return endpoint

    def _reset(self, endpoint: Endpoint) -> None:
        if endpoint.connection.is_known:
            self._rx.owe_reset(endpoint.connection.reset())
        self._drop(endpoint)

    def _drop(self, endpoint: Endpoint) -> None:
        self._remove(endpoint)
        endpoint.close()

    def _remove(self, endpoint: Endpoint) -> None:
        del self._endpoints[endpoint.key]
        self._leaving.pop(endpoint, None)
        self._rx.forget(endpoint)
        request = self._requests.pop(endpoint.key, None)
        if request is not None:
            request.on_refused()

    def expire(self, now: float) -> bool:
        """Reset connections whose guest has not answered in time; whether others may still be late.

        Args:
            now: ``time.monotonic()``.
        """
        late = [r.endpoint for r in self._requests.values() if r.deadline <= now]
        late += [endpoint for endpoint, deadline in self._leaving.items() if deadline <= now]
        for endpoint in late:
            if endpoint is not None:
                self._reset(endpoint)
        self._finish_visit()
        return bool(self._requests or self._leaving)

    def hang_up(self) -> None:
        """Take the last packets of a guest that has ended, pass its bytes on, and let no more connections in."""
        self.capacity = 0
        self.kick_tx()
        for endpoint in list(self._endpoints.values()):
            self._remove(endpoint)
            endpoint.pause_reading()
            self._lingering.add(endpoint)
            self._settle(endpoint)

    def drop_all(self) -> None:
        """Drop every connection without a word to the guest; hosts read end of stream."""
        for endpoint in list(self._endpoints.values()):
            self._drop(endpoint)
        for endpoint in self._lingering:
            endpoint.close()
        self._lingering.clear()

    def close(self) -> None:
        """Drop every connection and touch the queues no more."""
        self._is_closed = True
        self.drop_all()
