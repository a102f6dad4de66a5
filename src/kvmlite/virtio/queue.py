"""Virtqueues and the chains popped from them. The rings are walked in C (``virtq.c``).

Chains and views point into guest RAM: they end with the machine's memory, and a device that was reset must not use
those it had. The driver may change a buffer at any moment, so read what is judged once and judge the copy.
"""

from __future__ import annotations

import os

from kvmlite._native import ffi, lib
from kvmlite.errors import ConfigError, GuestFault, StateError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmlite.memory.guest_memory import GuestMemory

    Buffer = bytes | bytearray | memoryview

READ_LIMIT = 1 << 20
"""Bytes ``DescriptorChain.read`` copies at most: a chain may claim 4 GiB by naming the same pages again and again."""

_STATE_VERSION = 1
_UNLIMITED = -1

# Faults whose two numbers are an address and a size, rather than a value and its limit.
_RANGE_FAULTS = frozenset((lib.KVL_E_RING_RANGE, lib.KVL_E_DESC_RANGE, lib.KVL_E_INDIRECT_RANGE, lib.KVL_E_DESC_ORDER))


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLayout:
    """Where the driver put a queue, and how the two sides agreed to use it.

    Attributes:
        size: Descriptors.
        desc_gpa, avail_gpa, used_gpa: Guest-physical addresses of the three parts.
        event_idx, indirect: Whether VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC were negotiated.
    """

    size: int
    desc_gpa: int
    avail_gpa: int
    used_gpa: int
    event_idx: bool = False
    indirect: bool = False


class DescriptorChain:
    """Buffers of one request: a readable part, then a writable part, each seen as one run of bytes.

    Attributes:
        head_index: Names the chain in ``Virtqueue.add_used``.
        readable_size: Bytes the driver sent; up to 2**32.
        writable_size: Bytes the device may store; up to 2**32.

    Thread: the one that owns its queue.
    """

    __slots__ = ("_iov", "_readable_count", "_writable_count", "head_index", "readable_size", "writable_size")

    def __init__(self, native: Any) -> None:
        self.head_index: int = native.head
        self.readable_size: int = native.readable_size
        self.writable_size: int = native.writable_size
        self._readable_count: int = native.readable_count
        self._writable_count: int = native.writable_count
        count = self._readable_count + self._writable_count
        self._iov = ffi.new("struct iovec[]", count)
        ffi.memmove(self._iov, native.iov, count * ffi.sizeof("struct iovec"))

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Copy out of the readable part; fewer bytes than asked for at its end.

        Raises:
            GuestFault: That would be more than ``READ_LIMIT``: pass a size the device can afford.
        """
        wanted = self.readable_size - offset if size is None else min(size, self.readable_size - offset)
        if wanted <= 0:
            return b""
        if wanted > READ_LIMIT:
            raise GuestFault(f"readable part of chain {self.head_index} has {wanted} bytes, allowed are {READ_LIMIT}")
        data = bytearray(wanted)
        lib.kvl_iov_read(self._iov, self._readable_count, offset, ffi.from_buffer(data), wanted)
        return bytes(data)

    def write(self, data: Buffer, offset: int = 0) -> int:
        """Copy into the writable part, from ``offset`` on; returns the bytes stored, fewer at its end."""
        source = ffi.from_buffer(data)
        iov = self._iov + self._readable_count
        return int(lib.kvl_iov_write(iov, self._writable_count, offset, source, len(source)))

    def readable_views(self, offset: int = 0, size: int | None = None) -> list[memoryview]:
        """The readable part without a copy, for ``sendmsg`` and ``writev``; the views are read-only."""
        views = self._views(0, self._readable_count, offset, size)
        return [view.toreadonly() for view in views]

    def writable_views(self, offset: int = 0, size: int | None = None) -> list[memoryview]:
        """The writable part without a copy, for ``recvmsg_into`` and ``preadv``."""
        return self._views(self._readable_count, self._writable_count, offset, size)

    def writable_ranges(self) -> list[tuple[int, int]]:
        """Where the writable part lies: ``(address in this process, bytes)`` of each buffer, in order."""
        first, count = self._readable_count, self._writable_count
        return [(int(ffi.cast("uintptr_t", iov.iov_base)), iov.iov_len) for iov in self._iov[first : first + count]]

    def _views(self, first: int, count: int, offset: int, size: int | None) -> list[memoryview]:
        views: list[memoryview] = []
        left = 1 << 33 if size is None else size
        for iov in self._iov[first : first + count]:
            length = iov.iov_len
            if offset >= length:
                offset -= length
                continue
            length = min(length - offset, left)
            if length <= 0:
                break
            views.append(memoryview(ffi.buffer(ffi.cast("char *", iov.iov_base) + offset, length)))
            left -= length
            offset = 0
        return views


class Virtqueue:
    """One queue of a device that is active. Made by the transport at DRIVER_OK.

    Args:
        memory: Guest RAM.
        layout: What the driver set up; None for a queue it does not use, which never yields a chain.
        name: How messages call the device.
        index: Number of the queue.
        kick_eventfd: Readable after the driver's notification; the transport's.
        on_fault: Told, once, that the driver broke the queue; ``pop`` then returns None for good. Without it ``pop``
            raises.

    Raises:
        GuestFault: The layout breaks the rules (VIRTIO 1.2, 2.7).

    Thread: all methods on the device loop, or wherever the device's worker runs; one at a time.
    """

    __slots__ = (
        "_budget", "_chain", "_iov", "_memory", "_native", "_on_fault", "has_more", "index", "is_broken", "is_stopped",
        "kick_eventfd", "layout", "name", "size",
    )  # fmt: skip

    def __init__(
        self,
        memory: GuestMemory,
        layout: QueueLayout | None,
        *,
        name: str = "device",
        index: int = 0,
        kick_eventfd: int = -1,
        on_fault: Callable[[GuestFault], None] | None = None,
    ) -> None:
        self.name = name
        self.index = index
        self.layout = layout
        self.kick_eventfd = kick_eventfd
        self.size = layout.size if layout else 0
        self.is_stopped = layout is None
        self.is_broken = False
        self.has_more = False
        self._budget = _UNLIMITED
        self._on_fault = on_fault
        self._memory = memory  # keeps the native struct alive
        self._native = ffi.new("struct kvl_virtq *")
        if layout is not None:
            self._init_rings(layout)
        self._iov = ffi.new("struct iovec[]", self.size)
        self._chain = ffi.new("struct kvl_chain *", {"iov": self._iov})

    def _init_rings(self, layout: QueueLayout) -> None:
        native = ffi.new("struct kvl_virtq_layout *")
        native.size = layout.size
        native.desc_gpa, native.avail_gpa, native.used_gpa = layout.desc_gpa, layout.avail_gpa, layout.used_gpa
        native.event_idx, native.indirect = layout.event_idx, layout.indirect
        code = lib.kvl_virtq_init(self._native, self._memory.native, native)
        if code:
            raise self._to_fault(code)

    @property
    def native(self) -> Any:
        """``struct kvl_virtq *``, for a worker in C that takes the queue over."""
        return self._native

    @property
    def in_flight(self) -> int:
        """Chains popped and not yet given back."""
        return int((self._native.last_avail_idx - self._native.used_idx) & 0xFFFF)

    def pop(self) -> DescriptorChain | None:
        """Take the next chain; None if there is none now, and then the driver's next one is followed by a visit.

        Raises:
            GuestFault: The driver broke the rules of the ring. Never on a queue that came from a transport: there the
                fault is dealt with behind the device's back and the queue merely stays empty.

        Spec: VIRTIO 1.2, 2.7.5, 2.7.6 and 2.7.13.
        """
        if self.is_stopped or (self.is_broken and self._on_fault is not None):
            return None
        if self._budget == 0:
            self.has_more = True
            return None
        code = lib.kvl_virtq_pop(self._native, self._chain)
        if code > 0:
            if self._budget > 0:
                self._budget -= 1
            return DescriptorChain(self._chain)
        if code < 0:
            self._report(self._to_fault(code))
        return None

    def chain_at(self, head_index: int) -> DescriptorChain | None:
        """Return the chain with a head that is known to be under way, for who takes over from another process.

        None if the driver has broken it: dealt with as in ``pop``.
        """
        if self.is_stopped:
            return None
        code = lib.kvl_virtq_chain_at(self._native, head_index, self._chain)
        if code < 0:
            self._report(self._to_fault(code))
            return None
        return DescriptorChain(self._chain)

    def add_used(self, head_index: int, written: int) -> None:
        """Return a descriptor chain to the driver.

        The entry is visible to the guest before this returns. Raises no interrupt: ask ``needs_interrupt()`` once per
        batch.

        Args:
            head_index: Head of a chain from ``pop()``; 0 <= head_index < size.
            written: Bytes stored in the writable part, from its start; 0 if it has none.

        Raises:
            ValueError: head_index >= size (a bug in the device, not in the guest).
            StateError: The device was reset (the same).

        Spec: VIRTIO 1.2, 2.7.8.
        """
        if self.is_stopped:
            raise StateError(f"{self.name}: queue {self.index} is not in use")
        if not 0 <= head_index < self.size:
            raise ValueError(f"{self.name}: queue {self.index}: head {head_index} outside queue of size {self.size}")
        lib.kvl_virtq_push(self._native, head_index, written)

    def needs_interrupt(self) -> bool:
        """Whether the driver wants an interrupt for what was returned since the last call.

        Spec: VIRTIO 1.2, 2.7.7 and 2.7.10.
        """
        return not self.is_stopped and bool(lib.kvl_virtq_needs_interrupt(self._native))

    def disable_notifications(self) -> None:
        """Ask the driver not to kick, for a device that looks by itself; it may kick all the same."""
        if not self.is_stopped:
            lib.kvl_virtq_disable_notify(self._native)

    def enable_notifications(self) -> bool:
        """Ask for kicks again; returns whether buffers wait already, for which none will come."""
        return not self.is_stopped and bool(lib.kvl_virtq_enable_notify(self._native))

    def kick(self) -> None:
        """Have the transport visit this queue, as if the driver had kicked. Any thread."""
        if not self.is_stopped and self.kick_eventfd >= 0:
            os.eventfd_write(self.kick_eventfd, 1)

    def begin_visit(self, budget: int) -> None:
        """Let ``pop`` yield at most ``budget`` chains until ``end_visit``; for whoever calls ``process_queue``."""
        self._budget = budget
        self.has_more = False

    def end_visit(self) -> bool:
        """Lift the limit; returns whether ``pop`` stopped because of it: visit again soon."""
        self._budget = _UNLIMITED
        return self.has_more and not self.is_broken

    def stop(self) -> None:
        """Touch guest memory no more: the device was reset."""
        self.is_stopped = True

    def fail(self, fault: GuestFault) -> None:
        """Take no more chains: the driver broke the device's own rules. Those in flight may still be returned."""
        self._report(fault)

    def report_native_fault(self) -> None:
        """Deal with the fault that a worker in C met on this queue as ``pop`` would; nothing if there is none."""
        if self._native.fault:
            self._report(self._to_fault(self._native.fault))

    def _report(self, fault: GuestFault) -> None:
        is_first = not self.is_broken
        self.is_broken = True
        if self._on_fault is None:
            raise fault
        if is_first:
            self._on_fault(fault)

    def _to_fault(self, code: int) -> GuestFault:
        text = ffi.string(lib.kvl_error_text(code)).decode()
        seen, limit = self._native.fault_seen, self._native.fault_limit
        detail = f"{seen:#x} (size {limit:#x})" if code in _RANGE_FAULTS else f"{seen:#x} (limit {limit:#x})"
        return GuestFault(f"{self.name}: queue {self.index}: {text}: {detail}")

    def save(self) -> dict[str, int]:
        """Where the device stands in the rings; versioned. The rings themselves are guest memory."""
        native = self._native
        return {"version": _STATE_VERSION, "last_avail_idx": native.last_avail_idx, "used_idx": native.used_idx}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where ``save`` was called, on a queue of the same layout.

        Raises:
            ConfigError: The state is of another version or cannot be one of this queue.
        """
        if state.get("version") != _STATE_VERSION:
            raise ConfigError(f"{self.name}: queue state version {state.get('version')}, allowed is {_STATE_VERSION}")
        last_avail, used = state.get("last_avail_idx", -1), state.get("used_idx", -1)
        if not (0 <= last_avail <= 0xFFFF and 0 <= used <= 0xFFFF and (last_avail - used) & 0xFFFF <= self.size):
            raise ConfigError(
                f"{self.name}: queue {self.index}: saved indices {last_avail} and {used} do not fit a queue of {self.size}"
            )
        native = self._native
        native.last_avail_idx, native.used_idx, native.signalled_used = last_avail, used, used
        native.unsignalled = 65536  # interrupts may have been lost: the first question is answered with yes
