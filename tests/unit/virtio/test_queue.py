from __future__ import annotations

import pytest

from kvmlite.abi.virtio import (
    VRING_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)
from kvmlite.errors import ConfigError, GuestFault, StateError
from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing import DriverQueue, Used
from kvmlite.virtio.queue import DescriptorChain, QueueLayout, Virtqueue

RAM_SIZE = 2 << 20


def pop(queue: Virtqueue) -> DescriptorChain:
    chain = queue.pop()
    assert chain is not None
    return chain


def test_pop_on_an_empty_queue_returns_none(driver: DriverQueue) -> None:
    assert driver.device_side().pop() is None


@pytest.mark.parametrize("indirect", [False, True])
def test_pop_returns_readable_and_writable_parts(memory: GuestMemory, indirect: bool) -> None:
    driver = DriverQueue(memory, size=8, indirect=indirect)
    head = driver.add_chain(readable=[b"head", b"er"], writable=[3, 500])
    chain = pop(driver.device_side())
    assert (chain.head_index, chain.readable_size, chain.writable_size) == (head, 6, 503)
    assert chain.read() == b"header"
    assert chain.read(2, 3) == b"ade"
    assert chain.read(5) == b"r"
    assert chain.read(6, 10) == b""


def test_write_crosses_buffers_and_stops_at_the_end(driver: DriverQueue) -> None:
    queue = driver.device_side()
    driver.add_chain(readable=[b"x"], writable=[3, 2])
    chain = pop(queue)
    assert chain.write(b"abcd") == 4
    assert chain.write(b"EFGH", offset=3) == 2
    queue.add_used(chain.head_index, 5)
    used = driver.take_used()
    assert used == Used(0, 5)
    assert used is not None
    assert used.data == b"abcEF"


def test_views_show_the_same_bytes_without_a_copy(driver: DriverQueue) -> None:
    driver.add_chain(readable=[b"abc", b"defg"], writable=[2, 4])
    chain = pop(driver.device_side())
    assert [bytes(view) for view in chain.readable_views()] == [b"abc", b"defg"]
    assert [bytes(view) for view in chain.readable_views(2, 3)] == [b"c", b"de"]
    assert all(view.readonly for view in chain.readable_views())
    assert [len(view) for view in chain.writable_views(1)] == [1, 4]
    chain.writable_views(1)[1][:2] = b"zz"
    assert chain.writable_views()[1].tobytes() == b"zz\0\0"
    assert chain.writable_views(6) == []


def test_direct_descriptors_may_precede_an_indirect_one(driver: DriverQueue) -> None:
    first, second = driver.allocate(b"first"), driver.allocate(b"second")
    table = driver.allocate(VRING_DESC.pack(second, 6, VRING_DESC_F_NEXT, 1) + VRING_DESC.pack(first, 5, 0, 0))
    driver.set_descriptor(0, first, 5, VRING_DESC_F_NEXT, 3)
    driver.set_descriptor(3, table, 32, VRING_DESC_F_INDIRECT)
    driver.publish(0)
    assert pop(driver.device_side()).read() == b"firstsecondfirst"


def test_the_write_flag_of_an_indirect_descriptor_means_nothing(driver: DriverQueue) -> None:
    table = driver.allocate(VRING_DESC.pack(driver.allocate(b"data"), 4, 0, 0))
    driver.set_descriptor(0, table, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE)
    driver.publish(0)
    assert pop(driver.device_side()).read() == b"data"


def test_an_indirect_table_may_have_any_alignment(driver: DriverQueue) -> None:
    table = driver.allocate(b"?" + VRING_DESC.pack(driver.allocate(b"data"), 4, 0, 0)) + 1
    driver.set_descriptor(0, table, 16, VRING_DESC_F_INDIRECT)
    driver.publish(0)
    assert pop(driver.device_side()).read() == b"data"


def test_a_chain_may_have_as_many_descriptors_as_the_queue(driver: DriverQueue) -> None:
    driver.add_chain(readable=[b"x"] * 8)
    assert pop(driver.device_side()).read() == b"xxxxxxxx"


def test_buffers_of_zero_bytes_are_passed_over(driver: DriverQueue) -> None:
    driver.add_buffers([(0xFFFF_FFFF_FFFF_FFFF, 0, 0), (driver.allocate(b"data"), 4, 0), (0, 0, VRING_DESC_F_WRITE)])
    chain = pop(driver.device_side())
    assert (chain.readable_size, chain.writable_size) == (4, 0)
    assert chain.read() == b"data"


def test_a_buffer_may_end_with_the_last_byte_of_ram(driver: DriverQueue) -> None:
    driver.add_buffers([(RAM_SIZE - 16, 16, 0)])
    assert pop(driver.device_side()).read() == bytes(16)


def test_read_refuses_to_copy_more_than_its_limit(memory: GuestMemory) -> None:
    driver = DriverQueue(memory, size=8)
    driver.add_buffers([(0, RAM_SIZE, 0)])
    chain = pop(driver.device_side())
    with pytest.raises(GuestFault, match="2097152 bytes, allowed are 1048576"):
        chain.read()
    assert len(chain.read(0, 4096)) == 4096


def rings(memory: GuestMemory, **changes: int) -> Virtqueue:
    layout = {"size": 8, "desc_gpa": 0x1000, "avail_gpa": 0x2000, "used_gpa": 0x3000} | changes
    return Virtqueue(memory, QueueLayout(**layout), name="virtio-blk0", index=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "queue size is not a power of two within the maximum: 0x0 (limit 0x8000)"),
        ({"size": 6}, "queue size is not a power of two within the maximum: 0x6 (limit 0x8000)"),
        ({"size": 65536}, "queue size is not a power of two within the maximum: 0x10000 (limit 0x8000)"),
        ({"desc_gpa": 0x1008}, "ring address is not aligned: 0x1008 (limit 0x10)"),
        ({"avail_gpa": 0x2001}, "ring address is not aligned: 0x2001 (limit 0x2)"),
        ({"used_gpa": 0x3002}, "ring address is not aligned: 0x3002 (limit 0x4)"),
        ({"desc_gpa": RAM_SIZE - 0x70}, "ring is not inside guest RAM: 0x1fff90 (size 0x80)"),
        ({"avail_gpa": RAM_SIZE - 0x14}, "ring is not inside guest RAM: 0x1fffec (size 0x16)"),
        ({"used_gpa": RAM_SIZE - 0x44}, "ring is not inside guest RAM: 0x1fffbc (size 0x46)"),
        ({"used_gpa": 2**64 - 4}, "ring is not inside guest RAM: 0xfffffffffffffffc (size 0x46)"),
    ],
)
def test_rings_that_break_the_rules_are_refused(memory: GuestMemory, changes: dict[str, int], message: str) -> None:
    with pytest.raises(GuestFault) as caught:
        rings(memory, **changes)
    assert str(caught.value) == "virtio-blk0: queue 1: " + message


def test_rings_may_end_with_the_last_byte_of_ram(memory: GuestMemory) -> None:
    assert rings(memory, used_gpa=RAM_SIZE - 0x48).pop() is None


NEXT, WRITE, INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
OUTSIDE = RAM_SIZE


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        ([(0x8000, 16, NEXT, 0)], "chain has more descriptors than the queue: 0x9 (limit 0x8)"),
        ([(0x8000, 16, NEXT, 1), (0x8000, 16, NEXT, 0)], "chain has more descriptors than the queue: 0x9 (limit 0x8)"),
        ([(0x8000, 16, NEXT, 8)], "next descriptor outside its table: 0x8 (limit 0x8)"),
        (
            [(0x8000, 16, WRITE | NEXT, 1), (0x9000, 8, 0, 0)],
            "readable descriptor after a writable one: 0x9000 (size 0x8)",
        ),
        (
            [(0x8000, 0, WRITE | NEXT, 1), (0x9000, 8, 0, 0)],
            "readable descriptor after a writable one: 0x9000 (size 0x8)",
        ),
        ([(OUTSIDE, 1, 0, 0)], "descriptor is not inside guest RAM: 0x200000 (size 0x1)"),
        ([(OUTSIDE - 1, 2, WRITE, 0)], "descriptor is not inside guest RAM: 0x1fffff (size 0x2)"),
        ([(2**64 - 1, 2, 0, 0)], "descriptor is not inside guest RAM: 0xffffffffffffffff (size 0x2)"),
        ([(0xD0000000, 4, WRITE, 0)], "descriptor is not inside guest RAM: 0xd0000000 (size 0x4)"),
        ([(0x8000, 16, INDIRECT | NEXT, 1)], "indirect descriptor with a next one: 0x1 (limit 0x0)"),
        ([(0x8000, 0, INDIRECT, 0)], "indirect table size is not a positive multiple of 16: 0x0 (limit 0x10)"),
        ([(0x8000, 24, INDIRECT, 0)], "indirect table size is not a positive multiple of 16: 0x18 (limit 0x10)"),
        ([(OUTSIDE - 16, 32, INDIRECT, 0)], "indirect table is not inside guest RAM: 0x1ffff0 (size 0x20)"),
        ([(0x10000, 32, INDIRECT, 0)], "indirect descriptor inside an indirect table: 0x10000 (limit 0x20)"),
    ],
)
def test_chains_that_break_the_rules_are_refused(
    driver: DriverQueue, descriptors: list[tuple[int, int, int, int]], message: str
) -> None:
    for index, descriptor in enumerate(descriptors):
        driver.set_descriptor(index, *descriptor)
    driver.publish(0)
    queue = driver.device_side()
    with pytest.raises(GuestFault) as caught:
        queue.pop()
    assert str(caught.value) == "device: queue 0: " + message


def test_a_chain_of_more_than_4_gib_is_refused() -> None:
    memory = GuestMemory(0x9000_0000)  # never touched
    try:
        driver = DriverQueue(memory, size=8)
        driver.add_buffers([(0, 0x8000_0000, WRITE)] * 2)
        queue = driver.device_side()
        assert pop(queue).writable_size == 1 << 32
        driver.add_buffers([(0, 0x8000_0000, WRITE)] * 2 + [(0, 1, WRITE)])
        with pytest.raises(GuestFault, match=r"chain is larger than 4 GiB: 0x100000001 \(limit 0x100000000\)"):
            queue.pop()
    finally:
        memory.close()


def test_next_inside_an_indirect_table_stays_inside_it(driver: DriverQueue) -> None:
    table = driver.allocate(VRING_DESC.pack(0x8000, 4, NEXT, 1))
    driver.set_descriptor(0, table, 16, INDIRECT)
    driver.set_descriptor(1, 0x8000, 4)
    driver.publish(0)
    with pytest.raises(GuestFault, match="next descriptor outside its table"):
        driver.device_side().pop()


def test_an_indirect_descriptor_needs_its_feature(memory: GuestMemory, driver: DriverQueue) -> None:
    driver.set_descriptor(0, driver.allocate(bytes(16)), 16, INDIRECT)
    driver.publish(0)
    layout = QueueLayout(size=8, desc_gpa=driver.desc_gpa, avail_gpa=driver.avail_gpa, used_gpa=driver.used_gpa)
    with pytest.raises(GuestFault, match="indirect descriptor without the feature"):
        Virtqueue(memory, layout).pop()


def test_a_head_outside_the_queue_is_refused(driver: DriverQueue) -> None:
    driver.publish(8)
    with pytest.raises(GuestFault, match=r"chain head outside the queue: 0x8 \(limit 0x8\)"):
        driver.device_side().pop()


@pytest.mark.parametrize("size", [1, 2, 8, 512])
def test_the_available_index_may_be_ahead_by_the_queue_size_at_most(memory: GuestMemory, size: int) -> None:
    driver = DriverQueue(memory, size=size)
    for index in range(size):
        driver.set_descriptor(index, 0x8000, 1)
    for ahead in (*range(0, size + 1, max(1, size // 4)), size):
        driver.set_avail_idx(ahead)
        assert (driver.device_side().pop() is None) == (ahead == 0)
    for ahead in (size + 1, 0x7FFF, 0x8000, 0xFFFF):
        driver.set_avail_idx(ahead)
        with pytest.raises(GuestFault, match="available index runs ahead"):
            driver.device_side().pop()


def test_no_more_chains_are_in_flight_than_the_queue_has_descriptors(driver: DriverQueue) -> None:
    queue = driver.device_side()
    driver.set_descriptor(0, 0x8000, 1)
    for _ in range(8):
        driver.publish(0)
    for _ in range(8):
        pop(queue)
    assert queue.in_flight == 8
    driver.publish(0)
    with pytest.raises(GuestFault, match="more chains in flight"):
        queue.pop()


def test_a_broken_queue_stays_broken(driver: DriverQueue) -> None:
    queue = driver.device_side()
    driver.publish(8)
    for _ in range(2):
        with pytest.raises(GuestFault, match="head outside"):
            queue.pop()


def test_a_queue_with_a_fault_handler_reports_once_and_stays_empty(driver: DriverQueue) -> None:
    faults: list[GuestFault] = []
    queue = driver.device_side(on_fault=faults.append)
    good = driver.add_chain(writable=[4])
    chain = pop(queue)
    driver.publish(8)
    assert queue.pop() is None
    assert queue.pop() is None
    assert [str(fault) for fault in faults] == ["device: queue 0: chain head outside the queue: 0x8 (limit 0x8)"]
    queue.add_used(chain.head_index, 0)
    assert driver.take_used() == Used(good, 0)


def test_indices_wrap_at_65536(driver: DriverQueue) -> None:
    queue = driver.device_side()
    queue.restore({"version": 1, "last_avail_idx": 65534, "used_idx": 65534})
    driver.avail_idx = 65534
    driver._seen_used = 65534
    for value in (b"a", b"b", b"c", b"d"):
        head = driver.add_chain(readable=[value])
        chain = pop(queue)
        assert chain.read() == value
        queue.add_used(chain.head_index, 0)
        assert driver.take_used() == Used(head, 0)
    assert driver.used_idx == 2
    assert queue.in_flight == 0


def test_add_used_stores_the_entry_little_endian(driver: DriverQueue, memory: GuestMemory) -> None:
    queue = driver.device_side()
    driver.set_descriptor(5, 0x8000, 0x1000, WRITE)
    driver.publish(5)
    queue.add_used(pop(queue).head_index, 0x1000)
    assert memory.read(driver.used_gpa, 12) == bytes.fromhex("0000 0100 05000000 00100000")


def test_add_used_refuses_a_head_that_cannot_be(driver: DriverQueue) -> None:
    with pytest.raises(ValueError, match="head 8 outside queue of size 8"):
        driver.device_side().add_used(8, 0)


def test_interrupts_follow_the_flag_without_event_idx(driver: DriverQueue) -> None:
    queue = driver.device_side()
    assert not queue.needs_interrupt()  # nothing was used
    driver.add_chain(writable=[1])
    queue.add_used(pop(queue).head_index, 0)
    assert queue.needs_interrupt()
    assert not queue.needs_interrupt()
    driver.set_no_interrupt(True)
    driver.add_chain(writable=[1])
    queue.add_used(pop(queue).head_index, 0)
    assert not queue.needs_interrupt()


def use_chains(driver: DriverQueue, queue: Virtqueue, count: int) -> None:
    for _ in range(count):
        driver.add_chain(writable=[1])
        queue.add_used(pop(queue).head_index, 0)
        driver.take_used()


@pytest.mark.parametrize(
    ("used_event", "expected"),
    [(0, True), (2, True), (3, False), (0xFFFF, False)],  # after entries 0, 1 and 2
)
def test_with_event_idx_an_interrupt_comes_when_used_event_is_passed(
    memory: GuestMemory, used_event: int, expected: bool
) -> None:
    driver = DriverQueue(memory, size=8, event_idx=True)
    queue = driver.device_side()
    driver.set_used_event(used_event)
    use_chains(driver, queue, 3)
    assert queue.needs_interrupt() is expected


def test_with_event_idx_only_entries_since_the_last_question_count(memory: GuestMemory) -> None:
    driver = DriverQueue(memory, size=8, event_idx=True)
    queue = driver.device_side()
    driver.set_used_event(0)
    use_chains(driver, queue, 1)
    assert queue.needs_interrupt()
    use_chains(driver, queue, 5)
    assert not queue.needs_interrupt()
    driver.set_used_event(6)
    use_chains(driver, queue, 1)
    assert queue.needs_interrupt()


def test_event_idx_overrides_the_no_interrupt_flag(memory: GuestMemory) -> None:
    driver = DriverQueue(memory, size=8, event_idx=True)
    queue = driver.device_side()
    driver.set_no_interrupt(True)
    use_chains(driver, queue, 1)
    assert queue.needs_interrupt()


def test_an_empty_pop_asks_for_the_next_kick(memory: GuestMemory) -> None:
    driver = DriverQueue(memory, size=8, event_idx=True)
    queue = driver.device_side()
    use_chains(driver, queue, 3)
    assert driver.avail_event == 0
    assert queue.pop() is None
    assert driver.avail_event == 3


def test_disabled_notifications_set_the_flag_and_leave_avail_event(memory: GuestMemory, driver: DriverQueue) -> None:
    queue = driver.device_side()
    queue.disable_notifications()
    assert queue.pop() is None
    assert driver.used_flags == VRING_USED_F_NO_NOTIFY
    assert not queue.enable_notifications()
    assert driver.used_flags == 0
    with_event = DriverQueue(memory, size=8, event_idx=True, base=0x80000)
    queue = with_event.device_side()
    queue.disable_notifications()
    use_chains(with_event, queue, 2)
    assert queue.pop() is None
    assert with_event.avail_event == 0
    with_event.add_chain(writable=[1])
    assert queue.enable_notifications()
    assert with_event.avail_event == 2


def test_a_visit_has_a_budget(driver: DriverQueue) -> None:
    queue = driver.device_side()
    for _ in range(4):
        driver.add_chain(writable=[1])
    queue.begin_visit(3)
    taken = 0
    while queue.pop() is not None:
        taken += 1
    assert taken == 3
    assert queue.end_visit()
    queue.begin_visit(3)
    assert queue.pop() is not None
    assert queue.pop() is None
    assert not queue.end_visit()


def test_a_queue_the_driver_does_not_use_is_empty(memory: GuestMemory) -> None:
    queue = Virtqueue(memory, None)
    assert queue.pop() is None
    assert not queue.needs_interrupt()
    assert not queue.enable_notifications()
    with pytest.raises(StateError, match="queue 0 is not in use"):
        queue.add_used(0, 0)


def test_a_restored_queue_goes_on_where_it_was_saved(driver: DriverQueue) -> None:
    first = driver.device_side()
    use_chains(driver, first, 3)
    state = first.save()
    assert state == {"version": 1, "last_avail_idx": 3, "used_idx": 3}
    second = driver.device_side()
    second.restore(state)
    head = driver.add_chain(readable=[b"next"])
    chain = pop(second)
    assert chain.read() == b"next"
    second.add_used(chain.head_index, 0)
    assert driver.take_used() == Used(head, 0)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 2, "last_avail_idx": 0, "used_idx": 0},
        {"version": 1, "last_avail_idx": 65536, "used_idx": 0},
        {"version": 1, "last_avail_idx": 0, "used_idx": -1},
        {"version": 1, "last_avail_idx": 9, "used_idx": 0},
    ],
)
def test_restore_refuses_a_state_that_cannot_be(driver: DriverQueue, state: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        driver.device_side().restore(state)
