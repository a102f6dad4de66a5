from __future__ import annotations

from support.recorder_device import Recorder

from kvmlite.errors import GuestFault
from kvmlite.testing import VirtioRig
from kvmlite.virtio.dispatch import VISIT_BUDGET
from kvmlite.virtio.queue import Virtqueue

NEEDS_RESET = 0x40


def test_a_fault_in_the_ring_asks_for_a_reset_and_stops_only_that_queue(rig: VirtioRig, recorder: Recorder) -> None:
    rig.start()
    rig.queues[0].publish(99)
    rig.kick(0)
    assert rig.driver.status == 15 | NEEDS_RESET
    assert rig.driver.take_interrupt() == 2
    statistics = rig.transport.statistics()
    assert statistics.faults == 1
    assert statistics.last_fault == "device0: queue 0: chain head outside the queue: 0x63 (limit 0x10)"
    recorder.log.clear()
    rig.kick(0)
    rig.queues[1].add_chain(writable=[1])
    rig.kick(1)
    assert recorder.log == [("visit", 1)]
    assert rig.queues[1].used_idx == 1
    assert rig.errors == []


def test_a_reset_mends_a_broken_queue(rig: VirtioRig) -> None:
    rig.start()
    rig.queues[0].publish(99)
    rig.kick(0)
    rig.restart()
    assert rig.driver.status == 15
    rig.queues[0].add_chain(writable=[1])
    rig.kick(0)
    assert rig.queues[0].used_idx == 1


def test_a_fault_the_device_raises_is_the_guests(rig: VirtioRig, recorder: Recorder) -> None:
    def refuse(queue: Virtqueue) -> None:
        queue.pop()
        raise GuestFault("request of 3 bytes, needed are 16")

    rig.start()
    recorder.on_visit = refuse
    rig.queues[0].add_chain(readable=[b"abc"])
    rig.kick(0)
    assert rig.driver.status == 15 | NEEDS_RESET
    assert rig.transport.statistics().last_fault == "request of 3 bytes, needed are 16"
    assert recorder.queues[0].pop() is None
    assert rig.errors == []


def test_a_fault_outside_a_visit_is_dealt_with_too(rig: VirtioRig, recorder: Recorder) -> None:
    rig.start()
    rig.queues[1].publish(8)
    assert recorder.queues[1].pop() is None
    assert rig.driver.status == 15 | NEEDS_RESET


def test_any_other_exception_is_the_machines(rig: VirtioRig, recorder: Recorder) -> None:
    def stumble(queue: Virtqueue) -> None:
        raise ZeroDivisionError("a bug")

    rig.start()
    recorder.on_visit = stumble
    rig.kick(0)
    assert [repr(error) for error in rig.errors] == ["ZeroDivisionError('a bug')"]
    assert rig.driver.status == 15
    recorder.log.clear()
    rig.kick(0)
    assert recorder.log == []


def test_a_fault_at_activation_asks_for_a_reset(rig: VirtioRig, recorder: Recorder) -> None:
    def refuse() -> None:
        raise GuestFault("features that do not go together")

    recorder.on_activate = refuse
    rig.start()
    assert rig.driver.status == 15 | NEEDS_RESET
    assert recorder.log == [("activate", 0x1_1000_0020)]
    assert rig.driver.take_interrupt() == 2
    rig.driver.reset()
    assert recorder.log[-1] == ("reset",)


def test_an_exception_at_activation_is_the_machines(rig: VirtioRig, recorder: Recorder) -> None:
    def stumble() -> None:
        raise OSError("a bug")

    recorder.on_activate = stumble
    rig.start()
    assert [repr(error) for error in rig.errors] == ["OSError('a bug')"]


def test_an_exception_in_config_space_is_the_machines(rig: VirtioRig, recorder: Recorder) -> None:
    recorder.config = None  # type: ignore[assignment]
    assert rig.transport.read(0x100, 4) == 0
    assert [type(error) for error in rig.errors] == [TypeError]


def test_a_queue_that_never_empties_does_not_starve_the_other(rig: VirtioRig, recorder: Recorder) -> None:
    rounds = 0

    def refill(queue: Virtqueue) -> None:
        nonlocal rounds
        rounds += 1
        while (chain := queue.pop()) is not None:
            queue.add_used(chain.head_index, 0)
            rig.queues[0].take_all_used()
            if rounds <= 3:
                rig.queues[0].add_chain(writable=[1])  # the guest is as fast as we are

    rig.start()
    recorder.on_visit = lambda queue: refill(queue) if queue.index == 0 else recorder.return_all(queue)
    rig.queues[0].add_chain(writable=[1])
    rig.driver.notify(0)
    rig.loop.run_once()
    assert rig.queues[0].used_idx == VISIT_BUDGET
    rig.queues[1].add_chain(writable=[1])
    rig.driver.notify(1)
    rig.loop.run_once()
    assert rig.queues[1].used_idx == 1
    rig.loop.run()
    assert rig.queues[0].used_idx == 3 * VISIT_BUDGET + 1


def test_a_kick_that_was_already_taken_is_no_visit(rig: VirtioRig, recorder: Recorder) -> None:
    rig.start()
    recorder.log.clear()
    rig.transport.state.dispatch._visit(recorder.queues[0])
    assert recorder.log == []
