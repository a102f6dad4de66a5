"""Towards the guest: the rx queue filled with resets, control packets and host bytes, in that order.

Nothing here grows with what a guest does: resets wait in a list with a limit (the tx queue is not read while it
is full, VIRTIO 1.2, 5.10.6.1), control packets are bits in their connection, and host bytes stay in their
socket until a guest buffer and credit are there to take them. A connection that cannot go on leaves the
poll set; it comes back when the driver adds buffers or grants credit.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from kvmlite.devices.vsock.endpoint import MAX_IOVECS, WOULD_BLOCK
from kvmlite.devices.vsock.packet import HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.devices.vsock.counters import Counters
    from kvmlite.devices.vsock.endpoint import Endpoint
    from kvmlite.virtio.queue import DescriptorChain, Virtqueue

RESET_LIMIT = 256  # RST packets that wait for rx buffers
_QUANTUM = 256 * 1024  # bytes one connection may move before the next has its turn
_TURNS = 16  # connections served in one visit
_BATCH = 32  # rx buffers filled by one system call, at most


class _Buffer:
    """An rx chain and the part of it that takes payload."""

    __slots__ = ("chain", "room", "views")

    def __init__(self, chain: DescriptorChain) -> None:
        self.chain = chain
        self.room = chain.writable_size - HEADER_SIZE
        self.views = chain.writable_views(HEADER_SIZE)


def _first(views: list[memoryview], size: int) -> list[memoryview]:
    """Return views of the first ``size`` bytes."""
    head = []
    for view in views:
        if size <= 0:
            break
        head.append(view[:size])
        size -= len(view)
    return head


class RxPump:
    """Fills the rx queue.

    Args:
        queue: The rx queue.
        counters: Totals to keep.
        on_end: Called with an endpoint whose host has sent all it will.

    Thread: the device loop.
    """

    def __init__(self, queue: Virtqueue, counters: Counters, on_end: Callable[[Endpoint], None]) -> None:
        self._queue = queue
        self._counters = counters
        self._on_end = on_end
        self._resets: deque[bytes] = deque()
        self._control: dict[Endpoint, None] = {}  # an ordered set
        self._ready: dict[Endpoint, None] = {}  # may have host bytes; not in the poll set
        self._spare: deque[_Buffer] = deque()  # popped, not used yet
        self.has_used = False  # buffers went back to the driver since this was cleared

    @property
    def is_full(self) -> bool:
        """Whether so many resets wait that no packet may be taken that could cause another."""
        return len(self._resets) >= RESET_LIMIT

    def owe_reset(self, packet: bytes) -> None:
        """Queue an RST packet; ask ``is_full`` before taking the packet that causes it."""
        self._resets.append(packet)

    def owe_control(self, endpoint: Endpoint) -> None:
        """Send what the endpoint's connection owes at the next ``run()``."""
        self._control[endpoint] = None

    def owe_data(self, endpoint: Endpoint) -> None:
        """Read the endpoint's host socket at the next ``run()``."""
        self._ready[endpoint] = None

    def forget(self, endpoint: Endpoint) -> None:
        """Owe this endpoint nothing any more."""
        self._control.pop(endpoint, None)
        self._ready.pop(endpoint, None)

    def run(self) -> bool:
        """Send what is owed as far as there are buffers.

        Returns:
            Whether work is left that buffers are there for: call again later.
        """
        while self._resets and self._send(self._resets[0]):
            self._resets.popleft()
            self._counters.resets_out += 1
        for endpoint in list(self._control):
            if not self._send_control(endpoint):
                return False
        for endpoint in list(self._ready)[:_TURNS]:
            if not self.drain(endpoint):
                return False
            self._ready.pop(endpoint, None)
        return bool(self._ready)

    def _send(self, packet: bytes) -> bool:
        buffer = self._take()
        if buffer is None:
            return False
        self._finish(buffer, packet, 0)
        return True

    def _take(self) -> _Buffer | None:
        if self._spare:
            return self._spare.popleft()
        for _ in range(self._queue.size):
            chain = self._queue.pop()
            if chain is None:
                return None
            if chain.writable_size > HEADER_SIZE:
                return _Buffer(chain)
            self._counters.malformed += 1
            self._queue.add_used(chain.head_index, 0)
            self.has_used = True
        return None

    def _finish(self, buffer: _Buffer, header: bytes, size: int) -> None:
        chain = buffer.chain
        chain.write(header)
        self._queue.add_used(chain.head_index, HEADER_SIZE + size)
        self._counters.packets_out += 1
        self.has_used = True

    def drain(self, endpoint: Endpoint) -> bool:
        """Move host bytes of one endpoint into guest buffers until there are no more or its turn is over.

        Returns:
            False if the rx queue ran out of buffers.
        """
        if not endpoint.may_read:
            endpoint.pause_reading()
            return True
        if not self._send_control(endpoint):
            return self._starve(endpoint)
        connection = endpoint.connection
        moved, count = 0, 1
        while moved < _QUANTUM:
            credit = connection.credit
            if not credit:
                self._stall(endpoint)
                return True
            buffers, views, room = self._batch(count, credit)
            if not buffers:
                if moved:  # others first, next time
                    self._ready.pop(endpoint, None)
                return self._starve(endpoint)
            size = endpoint.receive_into(views)
            self._fill(buffers, endpoint, max(size, 0))
            if size == 0:
                self._end(endpoint)
                return True
            if size == WOULD_BLOCK or size < room:
                break
            moved += size
            count = min(count * 4, _BATCH)
        endpoint.resume_reading()
        return True

    def _batch(self, count: int, credit: int) -> tuple[list[_Buffer], list[memoryview], int]:
        buffers: list[_Buffer] = []
        views: list[memoryview] = []
        room = 0
        while len(buffers) < count and room < credit and len(views) < MAX_IOVECS:
            buffer = self._take()
            if buffer is None:
                break
            buffers.append(buffer)
            views += buffer.views
            room += buffer.room
        if len(views) > MAX_IOVECS:
            views = views[:MAX_IOVECS]
            room = sum(map(len, views))
        if room > credit:
            return buffers, _first(views, credit), credit
        return buffers, views, room

    def _fill(self, buffers: list[_Buffer], endpoint: Endpoint, size: int) -> None:
        """Give the first buffers back with ``size`` bytes between them; keep the others."""
        self._counters.bytes_out += size
        for index, buffer in enumerate(buffers):
            if not size:
                self._spare.extendleft(reversed(buffers[index:]))
                return
            part = min(size, buffer.room)
            self._finish(buffer, endpoint.connection.next_data(part), part)
            size -= part

    def _starve(self, endpoint: Endpoint) -> bool:
        self._counters.buffer_stalls += 1
        endpoint.pause_reading()
        self._ready.setdefault(endpoint)
        return False

    def _stall(self, endpoint: Endpoint) -> None:
        self._counters.credit_stalls += 1
        endpoint.is_stalled = True
        endpoint.pause_reading()
        endpoint.connection.request_credit()
        self._send_control(endpoint)

    def _end(self, endpoint: Endpoint) -> None:
        endpoint.pause_reading()
        self._send_control(endpoint)
        self._on_end(endpoint)

    def _send_control(self, endpoint: Endpoint) -> bool:
        connection = endpoint.connection
        while connection.has_control:
            buffer = self._take()
            if buffer is None:
                self._control[endpoint] = None
                return False
            self._finish(buffer, connection.next_control(), 0)
        self._control.pop(endpoint, None)
        return True
