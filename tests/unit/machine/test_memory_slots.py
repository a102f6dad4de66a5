"""Where memory of devices comes to lie: after RAM, 1 GiB apart, each in a slot of its own."""

from __future__ import annotations

from kvmlite.machine.memory_slots import MemorySlots
from kvmlite.memory import GuestMemory

MIB, GIB = 1 << 20, 1 << 30


class SlotRecorder:
    """Takes what a VM would be told."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, int, int, int, int]] = []

    def set_memory_slot(self, slot: int, gpa: int, size: int, hva: int, *, flags: int = 0) -> None:
        self.slots.append((slot, gpa, size, hva, flags))


def slots_after(memory_size: int) -> list[tuple[int, int, int, int, int]]:
    memory, vm = GuestMemory(memory_size), SlotRecorder()
    try:
        slots = MemorySlots(vm, memory)  # type: ignore[arg-type]
        slots.add(0x200000, 1025 * MIB, read_only=True)
        slots.add(0x800000, 2 * MIB, read_only=False)
    finally:
        memory.close()
    return vm.slots


def test_with_little_ram_they_begin_at_4_gib() -> None:
    assert slots_after(64 * MIB) == [
        (1, 4 * GIB, 1025 * MIB, 0x200000, 2),
        (2, 6 * GIB, 2 * MIB, 0x800000, 0),
    ]


def test_with_ram_above_the_hole_they_begin_after_it() -> None:
    assert slots_after(3 * GIB + 2 * MIB) == [
        (2, 5 * GIB, 1025 * MIB, 0x200000, 2),
        (3, 7 * GIB, 2 * MIB, 0x800000, 0),
    ]
