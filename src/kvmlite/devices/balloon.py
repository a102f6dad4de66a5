"""virtio-balloon: memory that the guest does not need goes back to the host (VIRTIO 1.2, 5.5).

In two ways. The host asks for memory (``resize``), and the driver takes pages out of use until it has as much: inflate. Or
the driver tells by itself which memory is free just now (free page reporting), and uses it again whenever it likes.
"""

from __future__ import annotations

import errno
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from kvmlite.abi.virtio import VIRTIO_ID_BALLOON
from kvmlite.abi.virtio_balloon import (
    DEFLATE_QUEUE,
    INFLATE_QUEUE,
    STATS_QUEUE,
    VIRTIO_BALLOON_CONFIG,
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
    VIRTIO_BALLOON_F_PAGE_POISON,
    VIRTIO_BALLOON_F_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ,
    VIRTIO_BALLOON_PFN_SHIFT,
    VIRTIO_BALLOON_S_AVAIL,
    VIRTIO_BALLOON_S_CACHES,
    VIRTIO_BALLOON_S_HTLB_PGALLOC,
    VIRTIO_BALLOON_S_HTLB_PGFAIL,
    VIRTIO_BALLOON_S_MAJFLT,
    VIRTIO_BALLOON_S_MEMFREE,
    VIRTIO_BALLOON_S_MEMTOT,
    VIRTIO_BALLOON_S_MINFLT,
    VIRTIO_BALLOON_S_SWAP_IN,
    VIRTIO_BALLOON_S_SWAP_OUT,
    VIRTIO_BALLOON_STAT,
)
from kvmlite.errors import ConfigError, GuestFault, HostError
from kvmlite.memory.guest_memory import GuestMemoryError
from kvmlite.records import dataclass
from kvmlite.virtio.device import read_config_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import Virtqueue

PAGES_PER_MIB = (1 << 20) >> VIRTIO_BALLOON_PFN_SHIFT
PAGES_PER_VISIT = 1 << 15
"""Pages one visit of the inflate queue gives back: 128 MiB. A hostile list names pages that lie apart, each a system call."""
STATISTICS_LIMIT = 64
"""Statistics one message may hold; Linux sends 10."""

_ACTUAL = range(4, 8)  # bytes of config space that the driver may write
_POISON = range(12, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balloon:
    """A memory balloon.

    Attributes:
        target_mib: Memory the guest is to give up at the start, in MiB; less than it has.
        deflate_on_oom: The guest may take memory back when it has no other.
        free_page_reporting: Memory that the guest frees goes back to the host without being asked for.
    """

    target_mib: int = 0
    deflate_on_oom: bool = True
    free_page_reporting: bool = True

    def __post_init__(self) -> None:
        if self.target_mib < 0:
            raise ConfigError(f"balloon: target_mib {self.target_mib} is negative")

    def attach(self, resources: DeviceResources) -> VirtioBalloon:
        """Make the device.

        Raises:
            ConfigError: The target is not less than the machine's memory.
        """
        device = VirtioBalloon(
            resources, deflate_on_oom=self.deflate_on_oom, free_page_reporting=self.free_page_reporting
        )
        device.resize(self.target_mib)
        return device


@dataclass(frozen=True, slots=True, kw_only=True)
class BalloonStatistics:
    """What the guest's kernel says of its memory; None where it does not say.

    Attributes:
        swapped_in, swapped_out: Bytes since it booted.
        major_faults, minor_faults: Page faults since it booted.
        free, total, available, caches: Bytes; as MemFree, MemTotal, MemAvailable and Cached in Linux's /proc/meminfo.
        huge_page_allocations, huge_page_failures: Huge pages asked for and got, asked for in vain.
    """

    swapped_in: int | None = None
    swapped_out: int | None = None
    major_faults: int | None = None
    minor_faults: int | None = None
    free: int | None = None
    total: int | None = None
    available: int | None = None
    caches: int | None = None
    huge_page_allocations: int | None = None
    huge_page_failures: int | None = None


_STATISTICS = {
    VIRTIO_BALLOON_S_SWAP_IN: "swapped_in",
    VIRTIO_BALLOON_S_SWAP_OUT: "swapped_out",
    VIRTIO_BALLOON_S_MAJFLT: "major_faults",
    VIRTIO_BALLOON_S_MINFLT: "minor_faults",
    VIRTIO_BALLOON_S_MEMFREE: "free",
    VIRTIO_BALLOON_S_MEMTOT: "total",
    VIRTIO_BALLOON_S_AVAIL: "available",
    VIRTIO_BALLOON_S_CACHES: "caches",
    VIRTIO_BALLOON_S_HTLB_PGALLOC: "huge_page_allocations",
    VIRTIO_BALLOON_S_HTLB_PGFAIL: "huge_page_failures",
}


class VirtioBalloon:
    """Takes pages that the driver gives up.

    Queues: 0 inflate, 1 deflate, 2 statistics, then free page reporting. The specification has reporting at 4 always; Linux
    counts only the queues it uses, which makes it 3, or 2 without statistics. So each queue after the deflate queue
    is served as what the driver must mean by it.

    Args:
        resources: What the machine hands out.
        deflate_on_oom, free_page_reporting: As in :class:`Balloon`.

    Thread: queues on the device loop; ``resize``, ``statistics`` and the properties are for any thread.
    """

    device_id = VIRTIO_ID_BALLOON
    queues_elsewhere = False

    def __init__(
        self, resources: DeviceResources, *, deflate_on_oom: bool = True, free_page_reporting: bool = True
    ) -> None:
        self.name = resources.name
        self.device_features = 1 << VIRTIO_BALLOON_F_STATS_VQ
        self.queue_sizes: tuple[int, ...] = (128, 128, 16)
        if deflate_on_oom:
            self.device_features |= 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        if free_page_reporting:
            self.device_features |= 1 << VIRTIO_BALLOON_F_REPORTING | 1 << VIRTIO_BALLOON_F_PAGE_POISON
            self.queue_sizes += (64, 64)  # Linux wants 32 at least
        self._memory = resources.memory
        self._loop = resources.loop
        self._warn = resources.warn
        self._has_warned = False
        self._config = bytearray(VIRTIO_BALLOON_CONFIG.size)
        self._queues: tuple[Virtqueue, ...] = ()
        self._interrupt: Interrupt | None = None
        self._stats_head = -1  # the driver's statistics buffer, while the device has it
        self._has_statistics = False
        self._waiting: list[SimpleQueue[BalloonStatistics]] = []
        self._inflated_size = self._reported_size = 0

    # ---- the host's face ----

    @property
    def target_mib(self) -> int:
        """Memory the guest is asked to give up, in MiB."""
        return int(VIRTIO_BALLOON_CONFIG.unpack(self._config)[0]) // PAGES_PER_MIB

    @property
    def actual_mib(self) -> int:
        """Memory the guest says it has given up, in whole MiB."""
        return int(VIRTIO_BALLOON_CONFIG.unpack(self._config)[1]) // PAGES_PER_MIB

    @property
    def inflated_size(self) -> int:
        """Bytes given back to the host because the guest gave them up; since the start, never less."""
        return self._inflated_size

    @property
    def reported_size(self) -> int:
        """Bytes given back to the host because the guest reported them free; since the start, never less."""
        return self._reported_size

    def resize(self, target_mib: int) -> None:
        """Ask the guest to give up so much memory in all; it may take its time, or not manage.

        Args:
            target_mib: MiB; 0 gives it everything back.

        Raises:
            ConfigError: Not less than the machine's memory.
        """
        memory_mib = self._memory.size >> 20
        if not 0 <= target_mib < memory_mib:
            raise ConfigError(f"{self.name}: target of {target_mib} MiB; a guest of {memory_mib} MiB can give up less")

        def update() -> None:
            self._config[0:4] = (target_mib * PAGES_PER_MIB).to_bytes(4, "little")

        interrupt = self._interrupt
        if interrupt is None:
            update()
        else:
            interrupt.raise_config(update)

    def statistics(self, timeout_s: float = 5.0) -> BalloonStatistics:
        """Ask the guest's kernel for its memory statistics and wait for the answer.

        Raises:
            HostError: ETIMEDOUT: it did not answer.
            StateError: The machine has ended.

        Thread: any but the device loop. Blocks.
        """
        answer: SimpleQueue[BalloonStatistics] = SimpleQueue()
        self._loop.post(lambda: self._ask(answer))
        try:
            return answer.get(timeout=timeout_s)
        except Empty:
            self._loop.post(lambda: self._waiting.remove(answer) if answer in self._waiting else None)
            raise HostError(
                f"{self.name}: no statistics within {timeout_s:g} s",
                errno.ETIMEDOUT,
                hint="the guest runs no driver for the balloon (virtio_balloon), or is not up yet",
            ) from None

    def _ask(self, answer: SimpleQueue[BalloonStatistics]) -> None:
        """Return the statistics buffer: the driver fills it again. Without it the next one is the answer."""
        self._waiting.append(answer)
        if self._stats_head >= 0 and self._interrupt is not None:
            queue, head = self._queues[STATS_QUEUE], self._stats_head
            self._stats_head = -1
            queue.add_used(head, 0)
            if queue.needs_interrupt():
                self._interrupt.raise_queue()

    # ---- VirtioDevice ----

    def read_config(self, offset: int, size: int) -> bytes:
        """Return part of ``struct virtio_balloon_config``. Spec: VIRTIO 1.2, 5.5.4."""
        return read_config_bytes(bytes(self._config), offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take ``actual`` and ``poison_val``; all else is the device's."""
        for position, value in enumerate(data, start=offset):
            if position in _ACTUAL or position in _POISON:
                self._config[position] = value

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Start with the driver's queues."""
        self._has_statistics = bool(driver_features >> VIRTIO_BALLOON_F_STATS_VQ & 1)
        self._queues, self._interrupt = queues, interrupt

    def reset(self) -> None:
        """Forget the driver, and that it had given up memory: it starts with all it can reach."""
        self._loop.call(self._reset)

    def _reset(self) -> None:
        self._interrupt = None
        self._queues = ()
        self._stats_head = -1
        for written in (_ACTUAL, _POISON):
            self._config[written.start : written.stop] = bytes(4)

    def process_queue(self, index: int) -> None:
        """Serve a queue, by what the driver must mean by it."""
        if self._interrupt is None:
            return
        queue = self._queues[index]
        if index == INFLATE_QUEUE:
            self._inflate(queue)
        elif index == DEFLATE_QUEUE:
            self._deflate(queue)
        elif index == STATS_QUEUE and self._has_statistics:
            self._take_statistics(queue)
        else:
            self._take_reports(queue)
        if queue.needs_interrupt():
            self._interrupt.raise_queue()

    def close(self) -> None:
        """Hold nothing of the host."""

    def _inflate(self, queue: Virtqueue) -> None:
        """Spec: VIRTIO 1.2, 5.5.6: arrays of le32, each the number of a 4 KiB page."""
        left = PAGES_PER_VISIT
        while left > 0 and (chain := queue.pop()) is not None:
            if chain.readable_size % 4 or chain.readable_size > 4 * PAGES_PER_VISIT:
                raise GuestFault(
                    f"{self.name}: list of pages has {chain.readable_size} bytes, allowed are multiples of 4 up to "
                    f"{4 * PAGES_PER_VISIT}"
                )
            pages = memoryview(chain.read()).cast("I")
            left -= len(pages)
            spans = ((page << VIRTIO_BALLOON_PFN_SHIFT, 1 << VIRTIO_BALLOON_PFN_SHIFT) for page in pages)
            self._inflated_size += self._discard(spans)
            queue.add_used(chain.head_index, 0)
        if left <= 0:
            queue.kick()

    def _deflate(self, queue: Virtqueue) -> None:
        """Nothing is to be done: a page is there again when it is touched."""
        while (chain := queue.pop()) is not None:
            queue.add_used(chain.head_index, 0)

    def _take_reports(self, queue: Virtqueue) -> None:
        """The writable buffers are the free memory itself; the driver waits until it has them back.

        Spec: VIRTIO 1.2, 5.5.6.7: with a poison value other than 0 their contents must stay.
        """
        poison = VIRTIO_BALLOON_CONFIG.unpack(self._config)[3]
        while (chain := queue.pop()) is not None:
            if not poison:
                spans = ((self._memory.to_gpa(hva), size) for hva, size in chain.writable_ranges())
                self._reported_size += self._discard(spans)
            queue.add_used(chain.head_index, 0)

    def _discard(self, spans: Iterable[tuple[int, int]]) -> int:
        given_back = 0
        for gpa, size in merge_spans(spans):
            try:
                given_back += self._memory.discard(gpa, size)
            except GuestMemoryError as error:
                raise GuestFault(f"{self.name}: {error}") from error
            except HostError as error:
                if not self._has_warned:
                    self._has_warned = True
                    self._warn(f"{self.name}: {error}")
        return given_back

    def _take_statistics(self, queue: Virtqueue) -> None:
        """The driver's one buffer says how things are; it is kept until somebody asks again."""
        while (chain := queue.pop()) is not None:
            size = VIRTIO_BALLOON_STAT.size
            data = chain.read(0, STATISTICS_LIMIT * size)
            found = VIRTIO_BALLOON_STAT.iter_unpack(data[: len(data) // size * size])
            named = {_STATISTICS[tag]: value for tag, value in found if tag in _STATISTICS}
            if self._stats_head >= 0:  # a driver should have one buffer only; more of them must not get lost
                queue.add_used(self._stats_head, 0)
            self._stats_head = chain.head_index
            answers, self._waiting = self._waiting, []
            for answer in answers:
                answer.put(BalloonStatistics(**named))


def merge_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ``(start, size)`` that touch or overlap; ascending."""
    merged: list[tuple[int, int]] = []
    start = end = -1
    for first, size in sorted(spans):
        if first > end:
            if end > start:
                merged.append((start, end - start))
            start, end = first, first + size
        else:
            end = max(end, first + size)
    if end > start:
        merged.append((start, end - start))
    return merged
