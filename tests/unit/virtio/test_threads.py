"""Reset against a device loop that really runs: nothing is touched afterwards, nobody waits for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from support.recorder_device import Recorder

from kvmlite.abi.virtio import DeviceStatus
from kvmlite.host.loop import DeviceLoop
from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing import DriverQueue, MmioDriver
from kvmlite.virtio.mmio import MmioTransport
from kvmlite.virtio.queue import Virtqueue


class Bench:
    """A recorder device on a running loop."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.memory = GuestMemory(2 << 20)
        self.loop = DeviceLoop(self.errors.append)
        self.device = Recorder()
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.transport = MmioTransport(
            self.device, self.memory, self.loop, self.fds[0], tuple(self.fds[1:]), self.errors.append
        )
        self.driver = MmioDriver(self.transport)
        self.queues = [DriverQueue(self.memory, size=8, base=base) for base in (0x10000, 0x40000)]
        self.loop.start()

    def come_up(self) -> None:
        for queue in self.queues:
            queue.clear()
        self.driver.start(self.queues)

    def close(self) -> None:
        self.loop.stop()
        self.transport.close()
        for fd in self.fds:
            os.close(fd)
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_a_reset_waits_for_the_visit_under_way(bench: Bench) -> None:
    is_inside, may_leave = threading.Event(), threading.Event()

    def linger(queue: Virtqueue) -> None:
        is_inside.set()
        assert may_leave.wait(30)
        assert not queue.is_stopped

    bench.device.on_visit = linger
    bench.come_up()
    assert is_inside.wait(30)
    resetting = threading.Thread(target=bench.driver.reset)
    resetting.start()
    resetting.join(0.01)
    assert resetting.is_alive(), "the reset did not wait"
    may_leave.set()
    resetting.join(30)
    assert not resetting.is_alive()
    assert bench.device.log[-1] == ("reset",)
    assert bench.errors == []


def test_a_fault_during_a_reset_does_not_deadlock(bench: Bench) -> None:
    for _ in range(50):
        bench.come_up()
        bench.queues[0].publish(99)
        bench.driver.notify(0)
        bench.driver.reset()
        assert bench.driver.status == 0
    assert bench.errors == []


def test_a_storm_of_resets_under_kicks_leaves_a_working_device(bench: Bench) -> None:
    is_over = threading.Event()

    def kick() -> None:
        while not is_over.is_set():
            for index in (0, 1):
                bench.driver.notify(index)

    kicker = threading.Thread(target=kick)
    kicker.start()
    try:
        for _ in range(40):
            bench.come_up()
            bench.queues[0].add_chain(writable=[8])
            bench.driver.reset()
            bench.driver.reset()
    finally:
        is_over.set()
        kicker.join(30)
    bench.come_up()
    head = bench.queues[1].add_chain(writable=[8])
    done = threading.Event()
    bench.device.on_visit = lambda queue: (bench.device.return_all(queue), done.set())[0]
    bench.driver.notify(1)
    assert done.wait(30)
    bench.loop.call(lambda: None)
    used = bench.queues[1].take_used()
    assert used is not None
    assert used.head_index == head
    assert not bench.driver.status & DeviceStatus.NEEDS_RESET
    assert bench.errors == []
