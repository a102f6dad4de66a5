"""A guest driver for the socket device, on real rings in guest memory."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections import deque
from typing import NamedTuple

import pytest

from kvmlite.devices.vsock.device import VirtioVsock
from kvmlite.devices.vsock.mux import Request
from kvmlite.host.loop import DeviceLoop
from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing import DriverQueue, ManualLoop, Used

HDR = struct.Struct("<QQIIIHHIII")
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
GUEST_CID, HOST_CID = 3, 2


class Packet(NamedTuple):
    """A packet as the guest sees it."""

    src_port: int
    dst_port: int
    op: int
    payload: bytes = b""
    flags: int = 0
    buf_alloc: int = 65536
    fwd_cnt: int = 0
    size: int | None = None  # the header's len, if it lies
    type: int = 1
    src_cid: int = GUEST_CID
    dst_cid: int = HOST_CID

    def pack(self) -> bytes:
        size = len(self.payload) if self.size is None else self.size
        return (
            HDR.pack(
                self.src_cid,
                self.dst_cid,
                self.src_port,
                self.dst_port,
                size,
                self.type,
                self.op,
                self.flags,
                self.buf_alloc,
                self.fwd_cnt,
            )
            + self.payload
        )

    @classmethod
    def unpack(cls, data: bytes) -> Packet:
        src_cid, dst_cid, src_port, dst_port, size, kind, op, flags, alloc, fwd = HDR.unpack(data[:44])
        payload = data[44:]
        assert len(payload) == size
        return cls(src_port, dst_port, op, payload, flags, alloc, fwd, None, kind, src_cid, dst_cid)


class Ring(DriverQueue):
    """A driver's queue whose buffers are used again one by one, as a driver that streams needs."""

    def __init__(self, memory: GuestMemory, base: int, slot_size: int) -> None:
        super().__init__(memory, size=512, base=base, indirect=True)
        self._slot_size = slot_size  # bytes of one chain's buffers and of its indirect table
        self._slots = [base + 0x4000 + index * slot_size for index in range(self.size)]
        self._slot_of: dict[int, int] = {}
        self._taken: deque[Used] = deque()

    def add(self, readable: list[bytes], writable: list[int]) -> None:
        """Offer a chain."""
        assert self.pending < self.size
        slot = self._next_gpa = self._slots.pop()
        self._arena_end = slot + self._slot_size
        self._slot_of[self.add_chain(readable, writable)] = slot

    @property
    def used(self) -> deque[Used]:
        """What came back and has not been looked at."""
        for entry in self.take_all_used():
            self._slots.append(self._slot_of.pop(entry.head_index))
            self._taken.append(entry)
        return self._taken

    @property
    def pending(self) -> int:
        """Chains the device has."""
        assert self.used is self._taken  # takes what came back
        return len(self._slot_of)


class Guest:
    """A device, the driver that plays against it, and the loop between them."""

    packet_type = Packet

    def __init__(self, uds_path: str | None = None, loop: DeviceLoop | None = None) -> None:
        self.loop = loop or ManualLoop()
        self.device = VirtioVsock(guest_cid=GUEST_CID, loop=self.loop, uds_path=uds_path)
        self.memory = GuestMemory(48 << 20)
        self.interrupts = 0
        self.accepted: list[int] = []
        self.activate()

    def activate(self) -> None:
        self.rx, self.tx, self.event = (
            Ring(self.memory, base, slot_size)
            for base, slot_size in ((1 << 20, 0x2000), (8 << 20, 0x12000), (6 << 20, 0x100))
        )
        self.rx_queue = self.rx.device_side()
        queues = (self.rx_queue, self.tx.device_side(), self.event.device_side())
        self.device.activate(queues, self, 0)

    def raise_queue(self) -> None:
        self.interrupts += 1

    def raise_config(self) -> None:
        raise AssertionError("nothing in config space changes")

    def offer(self, count: int = 64, *sizes: int) -> None:
        """Give the device ``count`` rx buffers, or as many as the ring takes."""
        for _ in range(min(count, self.rx.size - self.rx.pending)):
            self.rx.add([], list(sizes or (44, 4096)))
        self.device.process_queue(0)
        self.loop.run()

    def send(self, *packets: Packet | bytes, cuts: tuple[int, ...] = ()) -> None:
        """Put packets into the tx queue, split into descriptors at ``cuts``, and kick."""
        for packet in packets:
            data = packet.pack() if isinstance(packet, Packet) else packet
            edges = [0, *[cut for cut in cuts if cut < len(data)], len(data)]
            self.tx.add([data[a:b] for a, b in itertools.pairwise(edges)], [])
        self.device.process_queue(1)
        self.loop.run()

    def received(self) -> list[Packet]:
        """Take what the device has put into rx buffers."""
        packets = []
        while self.rx.used:
            packets.append(Packet.unpack(self.rx.used.popleft().data))
        return packets

    # ---- the host ----

    def take_rx_buffers(self) -> None:
        """Leave the device without rx buffers: those it has popped and those it has not."""
        before = len(self.rx.used)
        pump = self.device._mux._rx
        heads = [buffer.chain.head_index for buffer in pump._spare]
        pump._spare.clear()
        while (chain := self.rx_queue.pop()) is not None:
            heads.append(chain.head_index)
        for head_index in heads:
            self.rx_queue.add_used(head_index, 0)
        while len(self.rx.used) > before:
            self.rx.used.pop()

    def device_fd(self) -> int:
        """The device's end of the only connection."""
        (endpoint,) = self.device._mux._endpoints.values()
        return endpoint._socket.fileno()

    def close_accepted(self) -> None:
        while self.accepted:
            os.close(self.accepted.pop())
        self.loop.run()

    def play_host(self, what: str) -> None:
        """Do one thing that a host may do."""
        if what == "buffers":
            self.offer(3)
        elif what == "host connects":
            self.device._open(1000, socket_pair_end(self), Request(lambda port: None, lambda: None))
        elif self.accepted and what == "host closes":
            os.close(self.accepted.pop(0))
        elif self.accepted:
            os.set_blocking(self.accepted[0], False)
            with contextlib.suppress(OSError):
                if what == "host writes":
                    os.write(self.accepted[0], b"from the host")
                else:
                    os.read(self.accepted[0], 1000)
        self.loop.run()

    def finish(self) -> None:
        self.device.close()
        self.loop.run()
        self.close_accepted()
        self.memory.close()


def socket_pair_end(guest: Guest) -> socket.socket:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    guest.accepted.append(theirs.detach())
    return ours


def _make_guest(**options) -> Guest:
    guest = Guest(**options)
    guest.device.listen(5, guest.accepted.append)
    guest.offer()
    return guest


@pytest.fixture(scope="session")
def make_guest():
    """Make a guest with 64 rx buffers of 4 KiB whose host listens at port 5; end it with ``finish``."""
    return _make_guest


@pytest.fixture
def guest():
    """Such a guest; ``accepted`` has the host's fds."""
    guest = _make_guest()
    yield guest
    guest.finish()
