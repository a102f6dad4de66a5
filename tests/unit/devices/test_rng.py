from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmlite.abi.virtio import VRING_DESC_F_WRITE, DeviceStatus
from kvmlite.devices.rng import REQUEST_LIMIT, Rng, VirtioRng
from kvmlite.testing import Used, VirtioRig, check_virtio_device
from kvmlite.testing.conformance import ATTACKS


@pytest.fixture
def rig() -> Iterator[VirtioRig]:
    with VirtioRig(lambda resources: VirtioRng(resources.name, source=lambda size: b"\xa5" * size)) as made:
        made.start()
        yield made


def test_the_device_conforms() -> None:
    check_virtio_device(Rng().attach)


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_on_the_ring_ends_in_needs_reset(rig: VirtioRig, name: str) -> None:
    ATTACKS[name](rig.queues[0])
    rig.kick(0)
    assert rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert rig.errors == []


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_request_is_filled_across_buffers(indirect: bool, event_idx: bool) -> None:
    with VirtioRig(Rng().attach, indirect=indirect, event_idx=event_idx) as rig:
        rig.start()
        for _ in range(3):
            head = rig.queues[0].add_chain(writable=[1, 64, 7])
            rig.queues[0].set_used_event(rig.queues[0].used_idx)
            rig.kick(0)
            used = rig.queues[0].take_used()
            assert used == Used(head, 72)
            assert used is not None
            assert used.data != bytes(72)
            assert rig.take_irq() == 1


def test_two_requests_get_different_bytes() -> None:
    with VirtioRig(Rng().attach) as rig:
        rig.start()
        for _ in range(2):
            rig.queues[0].add_chain(writable=[32])
        rig.kick(0)
        first, second = rig.queues[0].take_all_used()
        assert first.data != second.data


def test_a_greedy_request_gets_no_more_than_the_limit(rig: VirtioRig) -> None:
    rig.queues[0].add_buffers([(0x100000, 0x200000, VRING_DESC_F_WRITE)] * 4)
    rig.kick(0)
    assert rig.queues[0].take_used() == Used(0, REQUEST_LIMIT)
    assert rig.memory.read(0x100000 + REQUEST_LIMIT - 1, 2) == b"\xa5\0"


def test_a_request_without_room_comes_back_empty(rig: VirtioRig) -> None:
    head = rig.queues[0].add_chain(readable=[b"please"])
    rig.kick(0)
    assert rig.queues[0].take_used() == Used(head, 0)


def test_readable_buffers_are_left_alone(rig: VirtioRig) -> None:
    rig.queues[0].add_chain(readable=[b"please"], writable=[4])
    gpa = rig.queues[0]._arena
    rig.kick(0)
    assert rig.memory.read(gpa, 6) == b"please"


def test_a_batch_raises_one_interrupt(rig: VirtioRig) -> None:
    for _ in range(8):
        rig.queues[0].add_chain(writable=[16])
    rig.take_irq()
    rig.kick(0)
    assert rig.queues[0].used_idx == 8
    assert rig.take_irq() == 1


def test_config_space_is_empty(rig: VirtioRig) -> None:
    assert rig.driver.read_config(0, 8) == bytes(8)
