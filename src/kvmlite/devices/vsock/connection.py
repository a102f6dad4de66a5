"""One stream connection as a state machine: packets in, verdicts out, no I/O.

A connection is REQUESTED (the host asked, the guest has not answered) or OPEN; when it ends it leaves
the table. Shutdown is a pair of one-way flags for each side and never taken back (VIRTIO 1.2, 5.10.6.5).
Byte counters are 32-bit and wrap (VIRTIO 1.2, 5.10.6.3):

- guest to host: ``_received`` counts bytes the guest sent, ``_forwarded`` those the host socket took. The
  guest may have at most ``buffer_size`` bytes between the two.
- host to guest: ``_sent`` counts our bytes; the guest tells ``buf_alloc`` and ``fwd_cnt`` in each packet.

What the device owes the guest is a set of bits, not a queue, so that no sequence of guest packets makes it grow.
"""

from __future__ import annotations

from enum import Enum

from kvmlite.abi.virtio_vsock import (
    VIRTIO_VSOCK_OP_CREDIT_REQUEST,
    VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RESPONSE,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_OP_SHUTDOWN,
    VIRTIO_VSOCK_SHUTDOWN_BOTH,
    VIRTIO_VSOCK_SHUTDOWN_RCV,
    VIRTIO_VSOCK_SHUTDOWN_SEND,
)
from kvmlite.devices.vsock.packet import Header, pack_header

_WRAP = 0xFFFFFFFF

# Control packets owed to the guest, in the order in which they may go out.
_OWED = tuple(
    (1 << op, op)
    for op in (
        VIRTIO_VSOCK_OP_REQUEST,
        VIRTIO_VSOCK_OP_RESPONSE,
        VIRTIO_VSOCK_OP_CREDIT_UPDATE,
        VIRTIO_VSOCK_OP_CREDIT_REQUEST,
        VIRTIO_VSOCK_OP_SHUTDOWN,
    )
)
_OWES_REQUEST = 1 << VIRTIO_VSOCK_OP_REQUEST
_OWES_CREDIT_UPDATE = 1 << VIRTIO_VSOCK_OP_CREDIT_UPDATE
_OWES_CREDIT_REQUEST = 1 << VIRTIO_VSOCK_OP_CREDIT_REQUEST
_OWES_SHUTDOWN = 1 << VIRTIO_VSOCK_OP_SHUTDOWN


class Verdict(Enum):
    """What the owner of a connection has to do about a packet."""

    NOTHING = "bookkeeping only"
    ACCEPTED = "the guest took our request: data may flow"
    DATA = "pass the payload on to the host"
    DISCARD = "the host does not read any more: drop the payload"
    SHUTDOWN = "the guest closed one or both directions"
    RESET = "illegal: answer RST and drop the connection"
    GONE = "the guest reset the connection: drop it, answer nothing"


class Connection:
    """Protocol state of one stream.

    Args:
        guest_cid: Address of the guest.
        host_port: Port on the host's side (CID 2).
        guest_port: Port on the guest's side.
        buffer_size: Bytes the guest may have in flight towards the host (``buf_alloc``).

    Thread: the device loop.
    """

    __slots__ = (
        "_forwarded",
        "_guest_buffer_size",
        "_guest_forwarded",
        "_owed",
        "_received",
        "_reported",
        "_sent",
        "buffer_size",
        "guest_cid",
        "guest_port",
        "guest_shutdown",
        "host_port",
        "host_shutdown",
        "is_open",
    )

    def __init__(self, guest_cid: int, host_port: int, guest_port: int, buffer_size: int) -> None:
        self.guest_cid = guest_cid
        self.host_port = host_port
        self.guest_port = guest_port
        self.buffer_size = buffer_size
        self.is_open = False
        self.guest_shutdown = 0
        self.host_shutdown = 0
        self._owed = _OWES_REQUEST
        self._received = self._forwarded = self._reported = 0
        self._sent = self._guest_buffer_size = self._guest_forwarded = 0

    @classmethod
    def from_request(cls, header: Header, buffer_size: int) -> Connection:
        """Make the connection that a guest's REQUEST asks for; it owes the guest a RESPONSE."""
        connection = cls(header.src_cid, header.dst_port, header.src_port, buffer_size)
        connection.is_open = True
        connection._owed = 1 << VIRTIO_VSOCK_OP_RESPONSE
        connection._guest_buffer_size = header.buf_alloc
        connection._guest_forwarded = header.fwd_cnt
        return connection

    def receive(self, header: Header) -> Verdict:
        """Judge a packet of the guest and take over its counters.

        The caller has checked addresses, type, and that ``header.size`` bytes of payload are there.

        Spec: VIRTIO 1.2, 5.10.6.3 and 5.10.6.5.
        """
        op = header.op
        if op == VIRTIO_VSOCK_OP_RST:
            return Verdict.GONE
        self._guest_buffer_size = header.buf_alloc
        self._guest_forwarded = header.fwd_cnt
        if not self.is_open:
            if op != VIRTIO_VSOCK_OP_RESPONSE or not self.is_known:
                return Verdict.RESET
            self.is_open = True
            return Verdict.ACCEPTED
        if op == VIRTIO_VSOCK_OP_RW:
            return self._receive_data(header.size)
        if op == VIRTIO_VSOCK_OP_CREDIT_UPDATE:
            return Verdict.NOTHING
        if op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            self._owed |= _OWES_CREDIT_UPDATE
            return Verdict.NOTHING
        if op == VIRTIO_VSOCK_OP_SHUTDOWN:
            self.guest_shutdown |= header.flags & VIRTIO_VSOCK_SHUTDOWN_BOTH
            return Verdict.SHUTDOWN
        return Verdict.RESET

    def _receive_data(self, size: int) -> Verdict:
        if self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND:
            return Verdict.RESET
        if self.unforwarded + size > self.buffer_size:
            return Verdict.RESET
        self._received = (self._received + size) & _WRAP
        if self.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV:
            return Verdict.DISCARD
        return Verdict.DATA

    @property
    def unforwarded(self) -> int:
        """Bytes taken from the guest that the host has not: what the device holds for it."""
        return (self._received - self._forwarded) & _WRAP

    @property
    def credit(self) -> int:
        """Bytes the guest has room for; 0 if it has none or its counters make no sense."""
        in_flight = (self._sent - self._guest_forwarded) & _WRAP
        return max(self._guest_buffer_size - in_flight, 0)

    def forward(self, size: int) -> None:
        """Note that the host took ``size`` bytes (or nobody wants them); owe an update if it is worth one."""
        self._forwarded = (self._forwarded + size) & _WRAP
        unreported = (self._forwarded - self._reported) & _WRAP
        if unreported >= self.buffer_size // 4 and not self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND:
            self._owed |= _OWES_CREDIT_UPDATE

    def request_credit(self) -> None:
        """Owe the guest a question: how much room has it?"""
        self._owed |= _OWES_CREDIT_REQUEST

    def shut_host(self, flags: int) -> None:
        """Note that the host will not receive or send any more, and owe the guest the news."""
        if flags & ~self.host_shutdown:
            self.host_shutdown |= flags
            self._owed |= _OWES_SHUTDOWN

    @property
    def is_known(self) -> bool:
        """Whether the guest has heard of this connection."""
        return not self._owed & _OWES_REQUEST

    @property
    def has_control(self) -> bool:
        """Whether the guest is owed a control packet."""
        return self._owed != 0

    def next_control(self) -> bytes:
        """Return the header of the first control packet owed; call only if ``has_control``."""
        for bit, op in _OWED:
            if self._owed & bit:
                self._owed &= ~bit
                flags = self.host_shutdown if op == VIRTIO_VSOCK_OP_SHUTDOWN else 0
                return self._pack(0, op, flags)
        raise AssertionError("no control packet is owed")

    def next_data(self, size: int) -> bytes:
        """Return the header of a data packet with ``size`` bytes, 0 < size <= ``credit``."""
        self._sent = (self._sent + size) & _WRAP
        return self._pack(size, VIRTIO_VSOCK_OP_RW, 0)

    def _pack(self, size: int, op: int, flags: int) -> bytes:
        # Every packet tells the guest our counters, so a pending update has been given by any of them.
        self._owed &= ~_OWES_CREDIT_UPDATE
        self._reported = self._forwarded
        return pack_header(
            self.guest_cid,
            self.host_port,
            self.guest_port,
            size,
            op,
            flags,
            self.buffer_size,
            self._forwarded,
        )

    def reset(self) -> bytes:
        """Return the header of the RST that ends this connection."""
        return self._pack(0, VIRTIO_VSOCK_OP_RST, 0)
