"""Fuzzes virtio-balloon: page numbers of all kinds, statistics, reports; the host resizes it and asks for statistics."""

from __future__ import annotations

from queue import SimpleQueue
from struct import pack
from typing import TYPE_CHECKING

from fuzzkit.target import DeviceTarget

from kvmlite.abi.virtio_balloon import DEFLATE_QUEUE, STATS_QUEUE, VIRTIO_BALLOON_STAT
from kvmlite.devices import balloon
from kvmlite.devices.balloon import BalloonStatistics, VirtioBalloon
from kvmlite.testing import Used

if TYPE_CHECKING:
    from fuzzkit.target import Kick, Op

    from kvmlite.testing import DriverQueue
    from kvmlite.virtio.device import DeviceResources

MEMORY_MIB = 64  # what resize() goes by; the memory there is has 20 pages
PAGES = (0, 1, 6, 14, 15, 16, 31, 32, 33, 35, 36, 0xC0000, 0xD0000, 0x100000, 0x7FFFFFFF, 0xFFFFFFFF)


class Target(DeviceTarget):
    """A balloon whose host is never content."""

    holds = (0, 0, 1)  # the statistics buffer

    def attach(self, resources: DeviceResources) -> VirtioBalloon:
        resources.memory.size = MEMORY_MIB << 20
        balloon.PAGES_PER_VISIT = 48  # what a case of a few steps reaches
        self.device = VirtioBalloon(resources)
        return self.device

    def message(self, op: Op) -> bytes:
        if op.queue <= DEFLATE_QUEUE:
            return self._pages(op)
        if op.queue == STATS_QUEUE:
            tags = (op.index, op.value & 15, op.value >> 4 & 15, op.value & 0xFFFF)
            return b"".join(VIRTIO_BALLOON_STAT.pack(tag, op.value) for tag in tags[: 1 + op.size % 4]) * (op.size % 20)
        return b""

    def _pages(self, op: Op) -> bytes:
        start, count = PAGES[op.value & 15], 1 + op.size % 24
        step = (0, 1, 1, 2, 0xFFFFFFFF, 7, 3, 1)[op.value >> 4 & 7]
        pages = [(start + step * number) & 0xFFFFFFFF for number in range(count)]
        if op.value >> 7 & 1:
            pages += [PAGES[op.value >> shift & 15] for shift in (8, 12, 16, 20)]
        return pack(f"<{len(pages)}I", *pages) + bytes(op.value >> 24 & 3)

    def host(self, op: Op) -> None:
        if op.index % 2:
            answer: SimpleQueue[BalloonStatistics] = SimpleQueue()
            self.device._ask(answer)
        else:
            self.device.resize(op.value % MEMORY_MIB)

    def end_case(self) -> None:
        self.device._waiting.clear()
        self.device.resize(0)

    def honest(self, queue: DriverQueue, kick: Kick) -> None:
        before = self.device.inflated_size
        head = queue.add_chain(readable=[pack("<II", 14, 15)])
        kick()
        assert queue.take_used() == Used(head, 0)
        assert self.device.inflated_size == before + 8192
