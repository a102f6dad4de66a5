"""Acknowledgements from KVM's ring, seen by the C data plane (kvm_coalesced_mmio_ring of <linux/kvm.h>)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from kvmlite._native import ffi, lib

QUEUE, CONFIG = 1, 2
ENTRIES = (4096 - 8) // 24


class Ring:
    """What KVM does to the ring, and two devices that acknowledge at 0x64 and 0x164."""

    def __init__(self) -> None:
        self.page = ffi.new("char[4096]")
        self.acks = ffi.new("struct kvl_acks *")
        lib.kvl_acks_init(self.acks)
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self.irqs = [ffi.new("struct kvl_irq *") for _ in range(2)]
        for number, irq in enumerate(self.irqs):
            lib.kvl_irq_init(irq, self.eventfd)
            assert lib.kvl_acks_add(self.acks, irq, 0x64 + 0x100 * number)
        lib.kvl_acks_set_ring(self.acks, self.page)

    @property
    def first_and_last(self) -> tuple[int, int]:
        first, last = struct.unpack_from("II", ffi.buffer(self.page))
        return first, last

    def note(self, address: int, bits: int, size: int = 4) -> None:
        _, last = self.first_and_last
        struct.pack_into("QIIQ", ffi.buffer(self.page), 8 + 24 * last, address, size, 0, bits)
        struct.pack_into("I", ffi.buffer(self.page), 4, (last + 1) % ENTRIES)

    def close(self) -> None:
        os.close(self.eventfd)


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring()
    yield made
    made.close()


def test_an_acknowledgement_in_the_ring_clears_its_own_device(ring: Ring) -> None:
    for irq in ring.irqs:
        assert lib.kvl_irq_raise(irq, QUEUE | CONFIG) == 0
    ring.note(0x164, CONFIG)
    assert [lib.kvl_irq_status(irq) for irq in ring.irqs] == [QUEUE | CONFIG, QUEUE]
    assert ring.first_and_last == (1, 1)


def test_one_from_before_an_interrupt_does_not_clear_it(ring: Ring) -> None:
    lib.kvl_irq_raise(ring.irqs[0], QUEUE)
    ring.note(0x64, QUEUE)
    lib.kvl_irq_raise(ring.irqs[0], QUEUE)
    assert lib.kvl_irq_status(ring.irqs[0]) == QUEUE


def test_an_interrupt_of_another_device_carries_them_out_too(ring: Ring) -> None:
    lib.kvl_irq_raise(ring.irqs[0], CONFIG)
    ring.note(0x64, CONFIG)
    lib.kvl_irq_raise(ring.irqs[1], QUEUE)
    assert ring.first_and_last == (1, 1)
    assert lib.kvl_irq_status(ring.irqs[0]) == 0


@pytest.mark.parametrize(("address", "size"), [(0x60, 4), (0x264, 4), (0x64, 2), (0x64, 8)])
def test_what_is_no_acknowledgement_is_taken_out_and_does_nothing(ring: Ring, address: int, size: int) -> None:
    lib.kvl_irq_raise(ring.irqs[0], QUEUE)
    ring.note(address, QUEUE, size)
    assert lib.kvl_irq_status(ring.irqs[0]) == QUEUE
    assert ring.first_and_last == (1, 1)


def test_the_ring_goes_round(ring: Ring) -> None:
    for _ in range(3):
        for _ in range(ENTRIES - 1):
            ring.note(0x64, CONFIG)
        lib.kvl_irq_ack(ring.irqs[1], 0)  # the exit of a full ring
        first, last = ring.first_and_last
        assert first == last
    lib.kvl_irq_raise(ring.irqs[0], CONFIG)
    ring.note(0x64, CONFIG)
    assert lib.kvl_irq_status(ring.irqs[0]) == 0


def test_a_bit_that_is_always_set_stays(ring: Ring) -> None:
    lib.kvl_irq_set_always(ring.irqs[0], QUEUE)
    ring.note(0x64, QUEUE | CONFIG)
    assert lib.kvl_irq_status(ring.irqs[0]) == QUEUE
    lib.kvl_irq_set_always(ring.irqs[0], 0)
    lib.kvl_irq_ack(ring.irqs[0], QUEUE)
    assert lib.kvl_irq_status(ring.irqs[0]) == 0


def test_there_is_room_for_every_device_of_a_machine() -> None:
    acks = ffi.new("struct kvl_acks *")
    lib.kvl_acks_init(acks)
    irqs = [ffi.new("struct kvl_irq *") for _ in range(33)]
    assert [bool(lib.kvl_acks_add(acks, irq, 4)) for irq in irqs] == [True] * 32 + [False]
