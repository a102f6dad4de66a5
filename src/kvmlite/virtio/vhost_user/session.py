"""One back end from the first message on: what it can do, guest memory, queues started and stopped."""

from __future__ import annotations

import os
import time

from kvmlite.abi import vhost_user as abi
from kvmlite.abi.vhost_user import ProtocolFeature, Request
from kvmlite.errors import ConfigError
from kvmlite.records import dataclass
from kvmlite.virtio.vhost_user.connection import BackEndError, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from kvmlite.memory.guest_memory import GuestMemory
    from kvmlite.virtio.queue import QueueLayout, Virtqueue

REPLY_TIMEOUT_S = 10.0
"""For all messages of one call below: a driver's write to a status register waits no longer."""

HANDSHAKE_TIMEOUT_S = 30.0
"""For the first messages: the back end may still be starting."""

_INFLIGHT_LIMIT = 64 << 20  # bytes: 8 queues of 32768 descriptors take 4 MiB

_PROTOCOL_WANTED = sum(1 << feature for feature in ProtocolFeature)


@dataclass(frozen=True, slots=True, kw_only=True)
class InflightArea:
    """Memory in which a back end notes the requests under way, so that its successor can go on with them.

    Attributes:
        fd: The memory; owned.
        description: As the back end gave it, to be given back as it is.
    """

    fd: int
    description: bytes


def check_memory(memory: GuestMemory, name: str) -> None:
    """Check that another process can be given this memory.

    Raises:
        ConfigError: It cannot.
    """
    if memory.backing == "anonymous":
        raise ConfigError(
            f"{name} is served by another process, which cannot reach anonymous guest memory",
            hint="choose the memory backing memfd",
        )


class Session:
    """A back end that has answered the first questions.

    Args:
        sock: Connected to it; owned from now on.
        name: How messages call it.
        queue_count: Queues the device has.
        timeout_s: For the first messages.

    Attributes:
        features: What it offers, as virtio feature bits; some of them are the protocol's own.
        protocol: Protocol features in use.
        may_touch_queues: It has been given a queue it may work on.

    Raises:
        BackEndError: It does not answer, or cannot serve such a device.

    Thread: one at a time. Every call blocks, for a limited time.
    """

    def __init__(
        self, sock: socket.socket, name: str, queue_count: int, timeout_s: float = HANDSHAKE_TIMEOUT_S
    ) -> None:
        self.name = name
        self.protocol = 0
        self.may_touch_queues = False
        self._queue_count = queue_count
        self._connection = Connection(sock, name)
        try:
            self._set_timeout(timeout_s)
            self._negotiate()
        except BaseException:
            self.close()
            raise

    def _set_timeout(self, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        self._connection.deadline = time.monotonic() + timeout_s

    def fileno(self) -> int:
        """The socket, to be watched for its end; -1 once closed."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection; twice is harmless."""
        self._connection.close()

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature is in use."""
        return bool(self.protocol >> feature & 1)

    def _negotiate(self) -> None:
        connection = self._connection
        self.features = connection.ask_u64(Request.GET_FEATURES)
        if self.features >> abi.VHOST_USER_F_PROTOCOL_FEATURES & 1:
            self.protocol = connection.ask_u64(Request.GET_PROTOCOL_FEATURES) & _PROTOCOL_WANTED
            connection.tell(Request.SET_PROTOCOL_FEATURES, abi.U64.pack(self.protocol))
            connection.acknowledges = self.has(ProtocolFeature.REPLY_ACK)
        connection.tell(Request.SET_OWNER)
        if self.has(ProtocolFeature.MQ):
            most = connection.ask_u64(Request.GET_QUEUE_NUM)
            if most < self._queue_count:
                raise BackEndError(f"{self.name} serves {most} queues, the device has {self._queue_count}")

    def read_config(self, size: int) -> bytes:
        """Return the first ``size`` bytes of the configuration space.

        Raises:
            BackEndError: The back end has none, or of another size.
        """
        self._set_timeout()
        if not self.has(ProtocolFeature.CONFIG):
            raise BackEndError(f"{self.name} does not tell the device's configuration")
        reply = self._connection.ask(Request.GET_CONFIG, abi.CONFIG_HEADER.pack(0, size, 0) + bytes(size))
        if len(reply) != abi.CONFIG_HEADER.size + size:
            raise BackEndError(f"{self.name} answers GET_CONFIG with {len(reply)} bytes, asked for were {size}")
        return reply[abi.CONFIG_HEADER.size :]

    def open_inflight_area(self, queue_size: int) -> InflightArea | None:
        """Ask for memory to note requests under way in; None if the back end does not do that.

        Raises:
            BackEndError: What it gives is not that.
        """
        self._set_timeout()
        if not self.has(ProtocolFeature.INFLIGHT_SHMFD):
            return None
        wanted = abi.INFLIGHT.pack(0, 0, self._queue_count, queue_size)
        reply, fds = self._connection.ask_fds(Request.GET_INFLIGHT_FD, wanted)
        try:
            _check_inflight(self.name, reply, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return InflightArea(fd=fds[0], description=reply)

    def start(
        self,
        memory: GuestMemory,
        queues: Sequence[Virtqueue],
        *,
        driver_features: int,
        call_fds: Sequence[int],
        kick_fds: Sequence[int],
        bases: Sequence[int],
        inflight: InflightArea | None,
    ) -> None:
        """Hand guest memory and all queues that the driver set up to the back end, and have it look at each.

        Args:
            driver_features: Those that the back end did not offer are the front end's own, and not passed on.
            call_fds: For each queue, what the back end writes for an interrupt: the irqfd itself, or a ledger's.
            kick_fds: For each queue, readable after the driver's notification.
            bases: For each queue, the available index to go on at.
            inflight: From ``open_inflight_area``, of this back end or of the one before.

        Raises:
            BackEndError: It refused, or did not answer.
        """
        self._set_timeout()
        connection = self._connection
        own = self.features & 1 << abi.VHOST_USER_F_PROTOCOL_FEATURES
        connection.tell(Request.SET_FEATURES, abi.U64.pack(driver_features & self.features | own))
        self._set_memory(memory)
        if inflight is not None:
            connection.tell(Request.SET_INFLIGHT_FD, inflight.description, (inflight.fd,))
        for queue, call_fd, kick_fd, base in zip(queues, call_fds, kick_fds, bases, strict=True):
            if queue.layout is not None:
                self._start_queue(queue.index, queue.layout, call_fd, kick_fd, base)
                os.eventfd_write(kick_fd, 1)  # buffers may wait already; a ring starts at its first kick

    def _set_memory(self, memory: GuestMemory) -> None:
        # User addresses are guest-physical here as well: no pointer of ours gets out.
        regions = memory.regions
        payload = abi.MEMORY_HEADER.pack(len(regions), 0)
        for region in regions:
            payload += abi.MEMORY_REGION.pack(region.gpa, region.size, region.gpa, region.fd_offset)
        self._connection.tell(Request.SET_MEM_TABLE, payload, tuple([region.fd for region in regions]))

    def _start_queue(self, index: int, layout: QueueLayout, call_fd: int, kick_fd: int, base: int) -> None:
        tell = self._connection.tell
        tell(Request.SET_VRING_NUM, abi.VRING_STATE.pack(index, layout.size))
        tell(Request.SET_VRING_BASE, abi.VRING_STATE.pack(index, base))
        address = abi.VRING_ADDR.pack(index, 0, layout.desc_gpa, layout.used_gpa, layout.avail_gpa, 0)
        tell(Request.SET_VRING_ADDR, address)
        tell(Request.SET_VRING_CALL, abi.U64.pack(index), (call_fd,))
        self.may_touch_queues = True
        tell(Request.SET_VRING_KICK, abi.U64.pack(index), (kick_fd,))
        if self.features >> abi.VHOST_USER_F_PROTOCOL_FEATURES & 1:
            tell(Request.SET_VRING_ENABLE, abi.VRING_STATE.pack(index, 1))

    def stop(self, queues: Sequence[Virtqueue]) -> None:
        """Take the queues back: when this returns the back end touches them no more.

        Raises:
            BackEndError: It may still do so: end it.
        """
        self._set_timeout()
        for queue in queues:
            if queue.layout is not None:
                reply = self._connection.ask(Request.GET_VRING_BASE, abi.VRING_STATE.pack(queue.index, 0))
                if len(reply) != abi.VRING_STATE.size or abi.VRING_STATE.unpack(reply)[0] != queue.index:
                    raise BackEndError(f"{self.name} answers GET_VRING_BASE of queue {queue.index} with {reply.hex()}")


def _check_inflight(name: str, reply: bytes, fds: list[int]) -> None:
    if len(reply) not in (abi.INFLIGHT.size, abi.INFLIGHT.size - 4) or len(fds) != 1:
        raise BackEndError(f"{name} answers GET_INFLIGHT_FD with {len(reply)} bytes and {len(fds)} descriptors")
    size, offset, _, _ = abi.INFLIGHT.unpack(reply.ljust(abi.INFLIGHT.size, b"\0"))
    if not 0 < size <= _INFLIGHT_LIMIT or offset + size > os.fstat(fds[0]).st_size:
        raise BackEndError(f"{name} gives an area of {size} bytes at {offset} for requests under way, which it is not")
