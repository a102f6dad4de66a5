"""Fuzzes virtio-vsock: packets with any header, and hosts that listen, connect, write, stop reading and leave."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from fuzzkit.ends import Ends
from fuzzkit.target import DeviceTarget

from kvmlite.abi.virtio_vsock import TX_QUEUE, VIRTIO_VSOCK_HDR
from kvmlite.devices.vsock import host, mux, rx
from kvmlite.devices.vsock.device import VirtioVsock
from kvmlite.devices.vsock.mux import ANSWER_TIMEOUT_S, FIRST_HOST_PORT, Request
from kvmlite.testing import Used

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzzkit.target import Kick, Op

    from kvmlite.testing import DriverQueue
    from kvmlite.virtio.device import DeviceResources

GUEST_CID = 3
LISTENED = (1, 1024)
GUEST_PORTS = (100, 100, 101, 0xFFFFFFFF)
HOST_PORTS = (1, 1, 1, 1024, FIRST_HOST_PORT, FIRST_HOST_PORT, FIRST_HOST_PORT + 1, 7)
AMOUNTS = (1 << 18, 0, 1, 64, 4096, 65536, 0x7FFFFFFF, 0xFFFFFFFF)
OPERATIONS = (1, 1, 5, 5, 5, 2, 2, 3, 4, 4, 6, 6, 7, 7, 0, 8)
CIDS = (0, 1, 2, 3, 4, 0xFFFFFFFF, 1 << 32 | 2, 2**64 - 1)


def narrow_pair() -> tuple[socket.socket, socket.socket]:
    """As ``host.socket_pair``, but the device's end is soon full."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    return ours, theirs


class Target(DeviceTarget):
    """A socket device with two listeners."""

    holds = (64,)  # receive buffers that were taken and not needed yet
    honest_queue = TX_QUEUE

    def attach(self, resources: DeviceResources) -> VirtioVsock:
        host.socket_pair = narrow_pair
        # Limits that a case of a few steps reaches.
        mux.MAX_CONNECTIONS, mux.MANY_CONNECTIONS = 3, 2
        mux.BUFFER_SIZE, mux.SMALL_BUFFER_SIZE = 4096, 1024
        mux._TX_BUDGET, rx.RESET_LIMIT = 4, 3
        self.device = VirtioVsock(guest_cid=GUEST_CID, loop=resources.loop, name=resources.name)
        self._ends = Ends()
        self._request: Request | None = None
        for port in LISTENED:
            self.device.listen(port, self._accept)
        return self.device

    def _accept(self, fd: int) -> None:
        self._ends.add(socket.socket(fileno=fd))

    def message(self, op: Op) -> bytes:
        if op.queue != TX_QUEUE:
            return b""
        value = op.value
        payload = op.size % 1500 if op.index & 16 else op.size % 64
        source, sink, kind = GUEST_CID, 2, 1
        if value >> 32 & 31 == 31:
            source, sink = CIDS[value >> 40 & 7], CIDS[value >> 43 & 7]
        if value >> 37 & 31 == 31:
            kind = value >> 40 & 0xFFFF
        claimed = payload if value >> 20 & 7 < 7 else AMOUNTS[value >> 24 & 7]
        operation = OPERATIONS[op.index & 15] if op.index < 240 else value >> 56
        header = VIRTIO_VSOCK_HDR.pack(
            source, sink, GUEST_PORTS[value & 3], HOST_PORTS[value >> 2 & 7], claimed, kind, operation, value >> 5 & 3,
            AMOUNTS[value >> 8 & 7], (0, payload, AMOUNTS[value >> 14 & 7], value >> 32)[value >> 12 & 3],
        )  # fmt: skip
        return (header + bytes(payload))[: value >> 53 & 63 if value >> 48 & 31 == 31 else None]

    def host(self, op: Op) -> None:
        acts: tuple[Callable[[Op], None], ...] = (
            self._ends.write, self._ends.write, self._ends.write, self._ends.read, self._ends.read, self._shut,
            self._ends.close, self._connect, self._connect, self._cancel, self._expire, self._reset_transport,
            self._hang_up,
        )  # fmt: skip
        acts[op.index % len(acts)](op)

    def _shut(self, op: Op) -> None:
        if end := self._ends.choose(op):
            try:
                end.shutdown((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)[op.size % 3])
            except OSError:  # ENOTCONN: the device has closed its end
                return

    def _connect(self, op: Op) -> None:
        ours, theirs = narrow_pair()
        self._ends.add(theirs)
        self._request = Request(lambda port: None, lambda: None)
        self.device._open(GUEST_PORTS[op.value >> 8 & 3], ours, self._request)

    def _cancel(self, op: Op) -> None:
        if self._request is not None:
            self.device._cancel(self._request)

    def _expire(self, op: Op) -> None:
        if self.device._mux is not None:
            self.device._mux.expire(time.monotonic() + 2 * ANSWER_TIMEOUT_S)

    def _reset_transport(self, op: Op) -> None:
        self.device.send_transport_reset()

    def _hang_up(self, op: Op) -> None:
        self.device.hang_up()

    def end_case(self) -> None:
        self._ends.close_all()
        self._request = None

    def honest(self, queue: DriverQueue, kick: Kick) -> None:
        before = self.device.statistics()
        packet = VIRTIO_VSOCK_HDR.pack(GUEST_CID, 2, 100, 1, 0, 1, 1, 0, 65536, 0)
        head = queue.add_chain(readable=[packet])
        kick()
        assert queue.take_used() == Used(head, 0)
        after = self.device.statistics()
        assert after.connections == 1
        assert after.connections_opened == before.connections_opened + 1
