from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hostile import HostileChains, check_survives, hostile_chains

from kvmlite.abi.virtio import VIRTIO_F_VERSION_1, VRING_DESC_F_WRITE, DeviceStatus
from kvmlite.abi.virtio_balloon import VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_STAT
from kvmlite.devices.balloon import PAGES_PER_VISIT, Balloon, BalloonStatistics, VirtioBalloon, merge_spans
from kvmlite.errors import ConfigError, HostError
from kvmlite.memory import GuestMemory
from kvmlite.testing import Used, VirtioRig, check_virtio_device

PAGE = 4096
INFLATE, DEFLATE, STATS = 0, 1, 2
CONFIG_CHANGED = 2
REPORTING_ONLY = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BALLOON_F_REPORTING


@pytest.fixture
def rig() -> Iterator[VirtioRig]:
    with VirtioRig(Balloon(target_mib=2).attach) as made:
        made.start()
        yield made


def balloon(rig: VirtioRig) -> VirtioBalloon:
    assert isinstance(rig.device, VirtioBalloon)
    return rig.device


def pfns(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.mark.parametrize("spec", [Balloon(), Balloon(free_page_reporting=False, deflate_on_oom=False)])
def test_the_device_conforms(spec: Balloon) -> None:
    check_virtio_device(spec.attach)


def test_the_driver_reads_the_target_and_writes_what_it_gave(rig: VirtioRig) -> None:
    assert rig.driver.read_config(0, 16) == struct.pack("<IIII", 512, 0, 0, 0)
    rig.driver.store(0x100 + 4, 256)
    assert (balloon(rig).target_mib, balloon(rig).actual_mib) == (2, 1)
    rig.driver.store(0x100, 9)
    rig.driver.store(0x100 + 8, 9)
    assert rig.driver.read_config(0, 12) == struct.pack("<III", 512, 256, 0)


def test_a_new_target_is_announced(rig: VirtioRig) -> None:
    rig.driver.take_interrupt()
    balloon(rig).resize(7)
    assert rig.driver.take_interrupt() == CONFIG_CHANGED
    assert rig.driver.read_config(0, 4) == struct.pack("<I", 7 * 256)


@pytest.mark.parametrize("mib", [-1, 8, 1 << 30])
def test_a_target_beyond_the_machines_memory_is_refused(rig: VirtioRig, mib: int) -> None:
    with pytest.raises(ConfigError, match=rf"target of {mib} MiB; a guest of 8 MiB can give up less"):
        balloon(rig).resize(mib)
    assert balloon(rig).target_mib == 2


def test_a_target_beyond_the_machines_memory_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="target of 8 MiB"):
        VirtioRig(Balloon(target_mib=8).attach)
    with pytest.raises(ConfigError, match="is negative"):
        Balloon(target_mib=-1)


def test_inflated_pages_are_given_back_and_read_as_zeros(rig: VirtioRig) -> None:
    rig.memory.write(0x100000, b"\xa5" * (6 * PAGE))
    head = rig.queues[INFLATE].add_chain(readable=[pfns(0x101, 0x100), pfns(0x103)])
    rig.kick(INFLATE)
    assert rig.queues[INFLATE].take_used() == Used(head, 0)
    found = [rig.memory.read(0x100000 + page * PAGE, PAGE)[:1] for page in range(6)]
    assert found == [b"\0", b"\0", b"\xa5", b"\0", b"\xa5", b"\xa5"]
    assert balloon(rig).inflated_size == 3 * PAGE
    assert rig.take_irq() == 1


def test_neighbouring_pages_are_given_back_in_one_call(rig: VirtioRig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(GuestMemory, "discard", lambda self, gpa, size: calls.append((gpa, size)) or size)
    rig.queues[INFLATE].add_chain(readable=[pfns(0x107, 0x103, 0x104, 0x105, 0x104, 0x200)])
    rig.kick(INFLATE)
    assert calls == [(0x103000, 3 * PAGE), (0x107000, PAGE), (0x200000, PAGE)]


def test_deflated_pages_come_back_at_once(rig: VirtioRig) -> None:
    rig.memory.write(0x100000, b"kept")
    head = rig.queues[DEFLATE].add_chain(readable=[pfns(0x100)])
    rig.kick(DEFLATE)
    assert rig.queues[DEFLATE].take_used() == Used(head, 0)
    assert rig.memory.read(0x100000, 4) == b"kept"


@pytest.mark.parametrize("bad", [pfns(0x800), pfns(0x100, 0xFFFFFFFF), pfns(0x7FF) + b"\1\0", b"\0"])
def test_pages_outside_ram_and_ragged_lists_end_in_needs_reset(rig: VirtioRig, bad: bytes) -> None:
    rig.queues[INFLATE].add_chain(readable=[bad])
    rig.kick(INFLATE)
    assert rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert rig.errors == []


def test_long_lists_are_served_in_several_visits(rig: VirtioRig) -> None:
    rig.memory.write(0x200000, pfns(*[0x400] * 4096))
    for _ in range(16):
        rig.queues[INFLATE].add_buffers([(0x200000, 4 * 4096, 0)])
    before = rig.transport.statistics().visits
    rig.kick(INFLATE)
    assert len(rig.queues[INFLATE].take_all_used()) == 16
    assert rig.transport.statistics().visits - before == 1 + 16 * 4096 // PAGES_PER_VISIT


def test_a_list_too_long_for_a_visit_ends_in_needs_reset(rig: VirtioRig) -> None:
    rig.queues[INFLATE].add_buffers([(0x200000, 4 * PAGES_PER_VISIT + 4, 0)])
    rig.kick(INFLATE)
    assert rig.driver.status == 15 | DeviceStatus.NEEDS_RESET


@pytest.mark.parametrize(("features", "queue"), [(None, 3), (None, 4), (REPORTING_ONLY, 2), (REPORTING_ONLY, 4)])
def test_free_pages_are_reported_wherever_the_driver_counts_the_queue(features: int | None, queue: int) -> None:
    with VirtioRig(Balloon().attach) as rig:
        rig.start(features)
        rig.memory.write(0x200000, b"\xa5" * (4 * PAGE))
        buffers = [(0x200000, PAGE, VRING_DESC_F_WRITE), (0x201000, PAGE + 100, VRING_DESC_F_WRITE)]
        head = rig.queues[queue].add_buffers(buffers)
        rig.kick(queue)
        assert rig.queues[queue].take_used() == Used(head, 0)
        assert rig.memory.read(0x200000, 2 * PAGE) == bytes(2 * PAGE)
        assert rig.memory.read(0x202000, PAGE) == b"\xa5" * PAGE
        assert balloon(rig).reported_size == 2 * PAGE


def test_reported_pages_are_left_alone_when_the_guest_poisons_them(rig: VirtioRig) -> None:
    assert rig.driver.read_features() >> VIRTIO_BALLOON_F_PAGE_POISON & 1
    rig.driver.store(0x100 + 12, 0xAAAAAAAA)
    rig.memory.write(0x200000, b"\xaa" * PAGE)
    rig.queues[3].add_buffers([(0x200000, PAGE, VRING_DESC_F_WRITE)])
    rig.kick(3)
    assert rig.queues[3].take_used() == Used(0, 0)
    assert rig.memory.read(0x200000, PAGE) == b"\xaa" * PAGE


def test_a_driver_that_starts_over_has_given_up_nothing(rig: VirtioRig) -> None:
    rig.driver.store(0x100 + 4, 512)
    rig.driver.store(0x100 + 12, 1)
    rig.restart()
    assert rig.driver.read_config(0, 16) == struct.pack("<IIII", 512, 0, 0, 0)
    assert balloon(rig).actual_mib == 0


def statistics_message(*pairs: tuple[int, int]) -> bytes:
    return b"".join(VIRTIO_BALLOON_STAT.pack(tag, value) for tag, value in pairs)


def test_the_first_statistics_answer_who_waits_for_them(rig: VirtioRig) -> None:
    rig.queues[STATS].add_chain(readable=[statistics_message((4, 1 << 40), (5, 7), (99, 1)) + b"tail"])
    assert ask_statistics(rig, lambda: rig.kick(STATS)) == BalloonStatistics(free=1 << 40, total=7)
    assert rig.queues[STATS].take_used() is None


def ask_statistics(rig: VirtioRig, answer: Callable[[], None]) -> BalloonStatistics:
    """``statistics()``, and what the guest does when the device has asked: the loop has no thread here."""

    def post(function: Callable[[], object]) -> None:
        function()
        answer()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.loop, "post", post)
        return balloon(rig).statistics(timeout_s=0.01)


def test_a_kept_buffer_goes_back_to_be_filled_again(rig: VirtioRig) -> None:
    head = rig.queues[STATS].add_chain(readable=[statistics_message((4, 1))])
    rig.kick(STATS)
    assert rig.queues[STATS].take_used() is None
    rig.take_irq()
    with pytest.raises(HostError, match=r"no statistics within 0\.01 s") as caught:
        ask_statistics(rig, lambda: None)
    assert caught.value.errno == errno.ETIMEDOUT
    assert rig.queues[STATS].take_used() == Used(head, 0)
    assert rig.take_irq() == 1
    assert balloon(rig)._waiting == []


def test_a_second_statistics_buffer_does_not_get_lost(rig: VirtioRig) -> None:
    first = rig.queues[STATS].add_chain(readable=[statistics_message((4, 1))])
    rig.queues[STATS].add_chain(readable=[statistics_message((4, 2))])
    rig.kick(STATS)
    assert rig.queues[STATS].take_all_used() == [Used(first, 0)]


def test_memory_that_the_host_keeps_is_reported_once(rig: VirtioRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(memory: GuestMemory, gpa: int, size: int) -> int:
        raise HostError("cannot give memory back", errno.EINVAL)

    monkeypatch.setattr(GuestMemory, "discard", refuse)
    for page in (0x100, 0x200):
        rig.queues[INFLATE].add_chain(readable=[pfns(page)])
        rig.kick(INFLATE)
        assert rig.queues[INFLATE].take_used() is not None
    assert rig.warnings == ["device0: cannot give memory back"]
    assert rig.driver.status == 15


@pytest.mark.parametrize("queue", range(5))
def test_hostile_chains_do_no_harm(queue: int) -> None:
    with VirtioRig(Balloon().attach) as rig:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(hostile_chains)
        def offer(chains: HostileChains) -> None:
            check_survives(rig, queue, chains)

        offer()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9))))
def test_merged_spans_cover_the_same_bytes_and_do_not_touch(spans: list[tuple[int, int]]) -> None:
    merged = merge_spans(spans)
    covered = sorted({byte for start, size in spans for byte in range(start, start + size)})
    assert [byte for start, size in merged for byte in range(start, start + size)] == covered
    assert all(a + size < b for (a, size), (b, _) in pairwise(merged))


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_discarded_memory_is_the_hosts_again(backing: str) -> None:
    memory = GuestMemory(64 * PAGE, backing=backing)
    try:
        memory.write(0, b"\1" * (64 * PAGE))
        assert memory.discard(PAGE // 2, 10 * PAGE) == 9 * PAGE  # only whole pages
        assert memory.discard(100, 200) == 0
        if backing == "memfd":
            assert os.fstat(memory.regions[0].fd).st_blocks * 512 == (64 - 9) * PAGE
        assert memory.read(PAGE, 9 * PAGE) == bytes(9 * PAGE)
        assert memory.read(10 * PAGE, PAGE // 2) == b"\1" * (PAGE // 2)
    finally:
        memory.close()
