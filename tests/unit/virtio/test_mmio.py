from __future__ import annotations

import pytest
from support.recorder_device import Recorder

from kvmlite.abi.virtio import DeviceStatus
from kvmlite.abi.virtio_mmio import MmioRegister
from kvmlite.testing import VirtioRig, check_virtio_device

OFFERED = 1 << 5 | 1 << 28 | 1 << 29 | 1 << 32
UP = 15


def negotiate(rig: VirtioRig) -> None:
    assert rig.driver.negotiate(1 << 32)


def test_a_well_behaved_device_conforms() -> None:
    check_virtio_device(lambda resources: Recorder(resources.name))


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0x000, 0x74726976), (0x004, 2), (0x008, 42), (0x00C, 0x4C4D564B), (0x060, 0), (0x070, 0), (0x0FC, 0)],
)
def test_registers_before_any_driver(rig: VirtioRig, offset: int, value: int) -> None:
    assert rig.transport.read(offset, 4) == value


def test_shared_memory_regions_do_not_exist(rig: VirtioRig) -> None:
    for selector in (0, 1, 0xFFFFFFFF):
        rig.driver.store(MmioRegister.SHM_SEL, selector)
        assert [rig.transport.read(offset, 4) for offset in (0x0B0, 0x0B4, 0x0B8, 0x0BC)] == [0xFFFFFFFF] * 4


def test_device_features_come_in_two_words_and_zeros(rig: VirtioRig) -> None:
    words = []
    for selector in (0, 1, 2, 0xFFFFFFFF):
        rig.driver.store(MmioRegister.DEVICE_FEATURES_SEL, selector)
        words.append(rig.driver.load(MmioRegister.DEVICE_FEATURES))
    assert words == [0x30000020, 1, 0, 0]


@pytest.mark.parametrize("features", [0, OFFERED & ~(1 << 32), OFFERED | 1 << 6, OFFERED | 1 << 34, 1 << 32 | 1 << 63])
def test_features_ok_is_refused(rig: VirtioRig, features: int) -> None:
    assert not rig.driver.negotiate(features)
    assert rig.driver.status == 3


def test_a_feature_beyond_bit_63_is_invented(rig: VirtioRig) -> None:
    rig.driver.add_status(1)
    rig.driver.add_status(2)
    rig.driver.write_features(1 << 32)
    rig.driver.store(MmioRegister.DRIVER_FEATURES_SEL, 2)
    rig.driver.store(MmioRegister.DRIVER_FEATURES, 1)
    rig.driver.add_status(8)
    assert rig.driver.status == 3


def test_features_do_not_change_after_features_ok(rig: VirtioRig, recorder: Recorder) -> None:
    negotiate(rig)
    rig.driver.write_features(OFFERED)
    rig.driver.add_status(4)
    assert recorder.log == [("activate", 1 << 32)]


@pytest.mark.parametrize("value", [2, 4, 8, 12, 14, 6])
def test_a_step_out_of_order_is_ignored(rig: VirtioRig, value: int) -> None:
    rig.driver.store(MmioRegister.STATUS, value)
    assert rig.driver.status == 0
    assert rig.transport.statistics().refused == 1


def test_status_bits_are_not_cleared_one_by_one(rig: VirtioRig) -> None:
    negotiate(rig)
    rig.driver.store(MmioRegister.STATUS, 1)
    assert rig.driver.status == 11


def test_unknown_status_bits_and_needs_reset_are_not_the_drivers_to_set(rig: VirtioRig) -> None:
    rig.driver.store(MmioRegister.STATUS, 0xFFFFFF71)
    assert rig.driver.status == 1


def test_after_failed_only_a_reset_helps(rig: VirtioRig, recorder: Recorder) -> None:
    negotiate(rig)
    rig.driver.add_status(DeviceStatus.FAILED)
    assert rig.driver.status == 0x8B
    rig.driver.add_status(DeviceStatus.DRIVER_OK)
    assert rig.driver.status == 0x8B
    assert recorder.log == []
    rig.driver.reset()
    rig.start()
    assert rig.driver.status == UP


def test_activation_hands_over_queues_and_visits_each_once(rig: VirtioRig, recorder: Recorder) -> None:
    rig.queues[1].add_chain(writable=[4])
    rig.start()
    assert recorder.log == [("activate", 0x1_1000_0020), ("visit", 0), ("visit", 1)]
    assert [queue.size for queue in recorder.queues] == [16, 8]
    assert rig.queues[1].used_idx == 1
    assert rig.take_irq() == 1
    assert rig.driver.take_interrupt() == 1
    assert rig.driver.take_interrupt() == 0


def test_a_queue_that_is_not_ready_yields_nothing(rig: VirtioRig, recorder: Recorder) -> None:
    negotiate(rig)
    rig.driver.set_up_queue(1, rig.queues[1])
    rig.driver.add_status(4)
    rig.loop.run()
    assert [queue.is_stopped for queue in recorder.queues] == [True, False]
    assert recorder.log[1:] == [("visit", 1)]


def test_notifying_kicks_only_the_named_queue(rig: VirtioRig, recorder: Recorder) -> None:
    rig.start()
    recorder.log.clear()
    rig.kick(1)
    rig.kick(2)
    rig.kick(0x10001)
    assert recorder.log == [("visit", 1)]


@pytest.mark.parametrize("register", [0x038, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4])
def test_queue_registers_are_only_written_between_features_ok_and_ready(rig: VirtioRig, register: int) -> None:
    def setup() -> list[int]:
        queue = rig.transport.state.queues[0]
        return [queue.size, queue.desc_gpa, queue.avail_gpa, queue.used_gpa]

    rig.driver.store(register, 8)
    assert setup() == [0, 0, 0, 0]
    negotiate(rig)
    rig.driver.store(register, 8)
    assert sum(setup()) == (8 if register & 7 != 4 else 8 << 32)
    rig.driver.store(MmioRegister.QUEUE_READY, 1)
    before = setup()
    rig.driver.store(register, 16)
    assert setup() == before
    rig.driver.store(MmioRegister.QUEUE_READY, 0)
    rig.driver.store(register, 16)
    assert setup() != before


def test_every_queue_selector_is_harmless(rig: VirtioRig) -> None:
    negotiate(rig)
    for selector in (*range(300), *range(0, 65536, 257), 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        rig.driver.store(MmioRegister.QUEUE_SEL, selector)
        size = rig.driver.load(MmioRegister.QUEUE_NUM_MAX)
        assert size == (rig.device.queue_sizes[selector] if selector < 2 else 0)
        for register in (0x038, 0x044, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4):
            rig.driver.store(register, 1)
        assert rig.driver.load(MmioRegister.QUEUE_READY) == (1 if selector < 2 else 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({MmioRegister.QUEUE_NUM: 32}, "device0: queue 0: size 32, allowed are 16"),
        (
            {MmioRegister.QUEUE_NUM: 0},
            "device0: queue 0: queue size is not a power of two within the maximum: 0x0 (limit 0x8000)",
        ),
        (
            {MmioRegister.QUEUE_NUM: 7},
            "device0: queue 0: queue size is not a power of two within the maximum: 0x7 (limit 0x8000)",
        ),
        ({MmioRegister.QUEUE_DESC_LOW: 1}, "device0: queue 0: ring address is not aligned: 0x1 (limit 0x10)"),
        ({MmioRegister.QUEUE_USED_HIGH: 1}, "device0: queue 0: ring is not inside guest RAM: 0x100010128 (size 0x86)"),
    ],
)
def test_a_queue_that_cannot_be_asks_for_a_reset(
    rig: VirtioRig, recorder: Recorder, changes: dict[int, int], message: str
) -> None:
    negotiate(rig)
    rig.driver.set_up_queue(0, rig.queues[0])
    rig.driver.store(MmioRegister.QUEUE_READY, 0)
    for register, value in changes.items():
        rig.driver.store(register, value)
    rig.driver.store(MmioRegister.QUEUE_READY, 1)
    rig.driver.add_status(4)
    assert rig.driver.status == 0x4F
    assert rig.driver.take_interrupt() == 2
    assert recorder.log == []
    assert rig.transport.statistics().last_fault == message
    rig.restart()
    assert rig.driver.status == UP


def test_a_reset_quiesces_the_device_and_clears_everything(rig: VirtioRig, recorder: Recorder) -> None:
    rig.start()
    assert recorder.interrupt is not None
    interrupt, queue = recorder.interrupt, recorder.queues[0]
    interrupt.raise_queue()
    recorder.log.clear()
    rig.driver.reset()
    assert recorder.log == [("reset",)]
    assert queue.is_stopped
    assert rig.loop.watched == set()
    assert rig.driver.load(MmioRegister.INTERRUPT_STATUS) == 0
    rig.take_irq()
    interrupt.raise_queue()
    interrupt.raise_config()
    assert rig.take_irq() == 0
    assert rig.driver.load(MmioRegister.INTERRUPT_STATUS) == 0
    rig.driver.reset()
    assert recorder.log == [("reset",)]


def test_acknowledging_clears_only_the_bits_written(rig: VirtioRig, recorder: Recorder) -> None:
    rig.start()
    assert recorder.interrupt is not None
    recorder.interrupt.raise_queue()
    recorder.interrupt.raise_config()
    assert rig.driver.load(MmioRegister.INTERRUPT_STATUS) == 3
    rig.driver.store(MmioRegister.INTERRUPT_ACK, 1)
    assert rig.driver.load(MmioRegister.INTERRUPT_STATUS) == 2
    rig.driver.store(MmioRegister.INTERRUPT_ACK, 0xFFFFFFFC)
    assert rig.driver.load(MmioRegister.INTERRUPT_STATUS) == 2


def test_config_space_takes_every_width(rig: VirtioRig) -> None:
    assert rig.transport.read(0x100, 1) == 0x00
    assert rig.transport.read(0x102, 2) == 0x0302
    assert rig.transport.read(0x104, 4) == 0x07060504
    assert rig.transport.read(0x108, 8) == 0x0F0E0D0C0B0A0908
    assert rig.transport.read(0x10E, 4) == 0x00000F0E
    assert rig.transport.read(0xFFC, 8) == 0
    assert rig.transport.statistics().ignored == 1


def test_config_writes_reach_the_device_once_there_is_a_driver(rig: VirtioRig, recorder: Recorder) -> None:
    rig.transport.write(0x104, 2, 0xBEEF)
    assert recorder.log == []
    negotiate(rig)
    rig.transport.write(0x104, 2, 0x1BEEF)
    assert recorder.log == [("config", 4, b"\xef\xbe")]


def test_the_generation_changes_with_the_config(rig: VirtioRig, recorder: Recorder) -> None:
    rig.start()
    assert recorder.interrupt is not None
    before = rig.driver.load(MmioRegister.CONFIG_GENERATION)
    recorder.interrupt.raise_config(lambda: recorder.config.__setitem__(0, 0xAA))
    assert rig.driver.load(MmioRegister.CONFIG_GENERATION) != before
    assert rig.driver.read_config(0, 2) == b"\xaa\x01"
    assert rig.driver.take_interrupt() == 2


def test_odd_accesses_read_zero_and_are_counted(rig: VirtioRig) -> None:
    odd = [(0x000, 1), (0x000, 2), (0x000, 8), (0x001, 4), (0x028, 4), (0x010, 3), (0x020, 4), (0x0FE, 4), (0x100, 3)]
    for offset, size in odd:
        assert rig.transport.read(offset, size) == 0
        rig.transport.write(offset, size, 1)
    statistics = rig.transport.statistics()
    # 0x020 may be written, though not yet: that is refused, not ignored
    assert (statistics.reads, statistics.writes, statistics.ignored) == (9, 9, 17)
    assert statistics.refused == 1


def test_read_only_registers_ignore_writes(rig: VirtioRig) -> None:
    for offset in (0x000, 0x004, 0x008, 0x00C, 0x010, 0x034, 0x060, 0x0FC):
        before = rig.transport.read(offset, 4)
        rig.transport.write(offset, 4, 0x12345678)
        assert rig.transport.read(offset, 4) == before
