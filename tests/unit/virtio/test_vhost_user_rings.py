"""What is under way can be told from the rings that a dead process left."""

from __future__ import annotations

import random

import pytest

from kvmlite.errors import GuestFault
from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing import DriverQueue
from kvmlite.virtio.vhost_user.ledger import Ledger
from kvmlite.virtio.vhost_user.rings import heads_under_way, ring_indices


@pytest.fixture
def queue() -> DriverQueue:
    return DriverQueue(GuestMemory(1 << 20), size=16)


def play(queue: DriverQueue, seed: int, *, in_order: bool, deepest: int) -> set[int]:
    """Have chains offered and given back at random, now and then until none is left; the heads left at the end."""
    dice = random.Random(seed)
    device = queue.device_side()
    open_heads: list[int] = []
    for _ in range(300):
        if dice.random() < 0.5 and len(open_heads) < deepest:
            queue.add_chain(writable=[1])
            chain = device.pop()
            assert chain is not None
            open_heads.append(chain.head_index)
        elif open_heads:
            device.add_used(open_heads.pop(0 if in_order else dice.randrange(len(open_heads))), 0)
            queue.take_used()
    return set(open_heads)


def found(queue: DriverQueue) -> set[int]:
    available, used = ring_indices(queue.memory, queue.layout)
    heads = heads_under_way(queue.memory, queue.layout, available, used)
    assert len(heads) == len(set(heads)) == available - used
    return set(heads)


@pytest.mark.parametrize("seed", range(20))
def test_chains_given_back_in_order_leave_no_doubt(queue: DriverQueue, seed: int) -> None:
    assert play(queue, seed, in_order=True, deepest=8) == found(queue)
    queue.memory.close()


def test_chains_given_back_in_any_order_are_told_apart_nearly_always(queue: DriverQueue) -> None:
    right = 0
    for seed in range(60):
        queue.clear()
        right += play(queue, seed, in_order=False, deepest=3) == found(queue)
    queue.memory.close()
    assert right >= 48


def test_a_ledger_that_looks_often_enough_knows_for_certain(queue: DriverQueue) -> None:
    for seed in range(20):
        queue.clear()
        device = queue.device_side()
        ledger = Ledger("ledger", [device], -1)
        dice = random.Random(seed)
        open_heads: list[int] = []
        for step in range(400):
            if dice.random() < 0.5 and len(open_heads) < 8:
                queue.add_chain(writable=[1])
                chain = device.pop()
                assert chain is not None
                open_heads.append(chain.head_index)
            elif len(open_heads) > 1:
                device.add_used(open_heads.pop(dice.randrange(len(open_heads))), 0)
                queue.take_used()
            if step % 12 == 0:
                ledger.under_way(device)
        assert ledger.under_way(device) == (queue.avail_idx, queue.used_idx, sorted(open_heads))
        ledger.close()
    queue.memory.close()


def test_a_ledger_that_has_not_looked_for_long_says_so_until_the_queue_is_empty(queue: DriverQueue) -> None:
    device = queue.device_side()
    ledger = Ledger("ledger", [device], -1)
    for _ in range(17):
        queue.add_chain(writable=[1])
        chain = device.pop()
        assert chain is not None
        device.add_used(chain.head_index, 0)
        queue.take_used()
    queue.add_chain(writable=[1])
    assert ledger.under_way(device) is None
    chain = device.pop()
    assert chain is not None
    assert ledger.under_way(device) is None
    device.add_used(chain.head_index, 0)
    assert ledger.under_way(device) == (18, 18, [])
    ledger.forget(device, 18)
    head = queue.add_chain(writable=[1])
    assert ledger.under_way(device) == (19, 18, [head])
    ledger.close()
    queue.memory.close()


def test_indices_that_a_driver_moved_too_far_are_its_fault(queue: DriverQueue) -> None:
    queue.set_avail_idx(17)
    with pytest.raises(GuestFault, match="further apart than 16"):
        ring_indices(queue.memory, queue.layout)
    queue.memory.close()
