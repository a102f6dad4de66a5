"""Plays the guest's driver on real rings in guest memory (VIRTIO 1.2, 2.7, driver side)."""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING

from kvmlite.abi.virtio import (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_ELEM,
)
from kvmlite.virtio.queue import QueueLayout, Virtqueue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmlite.errors import GuestFault
    from kvmlite.memory.guest_memory import GuestMemory

_LE16 = Struct("<H")
_RING_SPACE = 0x4000  # room for the rings of a queue of up to 512 descriptors


@dataclass(frozen=True)
class Used:
    """An entry of the used ring.

    Attributes:
        head_index: Which chain.
        written: Bytes the device says it stored.
        data: What is in the chain's writable part, as far as ``written`` goes; not part of comparisons.
    """

    head_index: int
    written: int
    data: bytes = field(default=b"", compare=False)


class DriverQueue:
    """One queue, driver side. Buffers come from an arena that starts over when no chain is in flight.

    Args:
        memory: Guest RAM.
        size: Descriptors, at most 512.
        base: GPA of the rings; the arena follows 0x4000 bytes later.
        arena_size: Bytes.
        event_idx: Use used_event and avail_event.
        indirect: Put each chain into an indirect table.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        size: int = 8,
        base: int = 0x10000,
        arena_size: int = 0x1C000,
        event_idx: bool = False,
        indirect: bool = False,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.desc_gpa = base
        self.avail_gpa = base + 16 * size
        self.used_gpa = (self.avail_gpa + 6 + 2 * size + 3) & ~3
        assert self.used_gpa + 6 + 8 * size <= base + _RING_SPACE
        self._arena = base + _RING_SPACE
        self._arena_end = self._arena + arena_size
        self.clear()

    def clear(self) -> None:
        """Start over with empty rings, as after a reset."""
        self.memory.write(self.desc_gpa, bytes(_RING_SPACE))
        self.avail_idx = 0
        self._seen_used = 0
        self._free = list(range(self.size))
        self._chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}  # head: descriptors, writable buffers
        self._next_gpa = self._arena

    @property
    def layout(self) -> QueueLayout:
        """What the device is told."""
        return QueueLayout(
            size=self.size,
            desc_gpa=self.desc_gpa,
            avail_gpa=self.avail_gpa,
            used_gpa=self.used_gpa,
            event_idx=self.event_idx,
            indirect=True,
        )

    def device_side(self, on_fault: Callable[[GuestFault], None] | None = None, kick_eventfd: int = -1) -> Virtqueue:
        """Make the device's end, for tests without a transport. Without ``on_fault`` its ``pop`` raises."""
        return Virtqueue(self.memory, self.layout, name="device", on_fault=on_fault, kick_eventfd=kick_eventfd)

    # ---- well-behaved driver ----

    def add_chain(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> int:
        """Offer buffers: contents of the readable ones, sizes of the writable ones. Returns the head."""
        buffers = [(self.allocate(data), len(data), 0) for data in readable]
        buffers += [(self.allocate(bytes(size)), size, VRING_DESC_F_WRITE) for size in writable]
        return self.add_buffers(buffers)

    def add_buffers(self, buffers: Sequence[tuple[int, int, int]]) -> int:
        """Offer a chain of ``(gpa, size, flags)``, wherever they are. Returns the head."""
        writable = [(gpa, size) for gpa, size, flags in buffers if flags & VRING_DESC_F_WRITE]
        if self.indirect:
            used = self._write_indirect(buffers)
        else:
            used = [self._free.pop(0) for _ in buffers]
            for position, (gpa, size, flags) in enumerate(buffers):
                is_last = position == len(buffers) - 1
                following = 0 if is_last else used[position + 1]
                self.set_descriptor(used[position], gpa, size, flags | (0 if is_last else VRING_DESC_F_NEXT), following)
        self._chains[used[0]] = (used, writable)
        self.publish(used[0])
        return used[0]

    def _write_indirect(self, buffers: Sequence[tuple[int, int, int]]) -> list[int]:
        table = b""
        for position, (gpa, size, flags) in enumerate(buffers):
            is_last = position == len(buffers) - 1
            table += VRING_DESC.pack(
                gpa, size, flags | (0 if is_last else VRING_DESC_F_NEXT), 0 if is_last else position + 1
            )
        head = self._free.pop(0)
        self.set_descriptor(head, self.allocate(table), len(table), VRING_DESC_F_INDIRECT, 0)
        return [head]

    def take_used(self) -> Used | None:
        """Take the next used entry, or None; its descriptors are free again."""
        if self.used_idx == self._seen_used:
            return None
        entry = self.used_gpa + 4 + 8 * (self._seen_used % self.size)
        head, written = VRING_USED_ELEM.unpack(self.memory.read(entry, VRING_USED_ELEM.size))
        self._seen_used = (self._seen_used + 1) & 0xFFFF
        descriptors, writable = self._chains.pop(head)
        data = b"".join(self.memory.read(gpa, size) for gpa, size in writable)[:written]
        self._free += descriptors
        if not self._chains:
            self._next_gpa = self._arena
        return Used(head, written, data)

    def take_all_used(self) -> list[Used]:
        """Take all used entries."""
        entries = []
        while (entry := self.take_used()) is not None:
            entries.append(entry)
        return entries

    # ---- the parts of the rings ----

    def allocate(self, data: bytes) -> int:
        """Put bytes into the arena, 16-byte aligned; returns their GPA."""
        gpa = self._next_gpa
        self._next_gpa += len(data) + 15 & ~15
        assert self._next_gpa <= self._arena_end, "the arena is full"
        self.memory.write(gpa, data)
        return gpa

    def set_descriptor(self, index: int, gpa: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write one descriptor, whatever it says."""
        self.memory.write(self.desc_gpa + 16 * index, VRING_DESC.pack(gpa, size, flags, following))

    def publish(self, head: int) -> None:
        """Put a head into the available ring and advance its index."""
        self._store(self.avail_gpa + 4 + 2 * (self.avail_idx % self.size), head)
        self.set_avail_idx(self.avail_idx + 1 & 0xFFFF)

    def set_avail_idx(self, value: int) -> None:
        """Write the available index, whatever it says."""
        self.avail_idx = value
        self._store(self.avail_gpa + 2, value)

    def set_no_interrupt(self, value: bool) -> None:
        """Set or clear VRING_AVAIL_F_NO_INTERRUPT."""
        self._store(self.avail_gpa, VRING_AVAIL_F_NO_INTERRUPT if value else 0)

    def set_used_event(self, value: int) -> None:
        """Ask for an interrupt when the used index passes ``value``."""
        self._store(self.avail_gpa + 4 + 2 * self.size, value)

    @property
    def used_idx(self) -> int:
        """Index the device wrote."""
        return self._load(self.used_gpa + 2)

    @property
    def used_flags(self) -> int:
        """Flags the device wrote."""
        return self._load(self.used_gpa)

    @property
    def avail_event(self) -> int:
        """Available index after which the device wants a kick."""
        return self._load(self.used_gpa + 4 + 8 * self.size)

    def _store(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, _LE16.pack(value))

    def _load(self, gpa: int) -> int:
        return int(_LE16.unpack(self.memory.read(gpa, 2))[0])
