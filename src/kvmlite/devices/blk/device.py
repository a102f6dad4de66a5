"""The block device: features and configuration here, requests in C (``blk.c``), a thread per queue."""

from __future__ import annotations

import mmap
import os

from kvmlite._native import ffi, lib
from kvmlite.abi.virtio import VIRTIO_ID_BLOCK
from kvmlite.abi.virtio_blk import (
    SECTOR_SIZE,
    VIRTIO_BLK_CONFIG,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
)
from kvmlite.errors import HostError, StateError
from kvmlite.host.timer import TimerFd
from kvmlite.records import dataclass
from kvmlite.virtio.device import read_config_bytes
from kvmlite.virtio.worker import QueueWorker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmlite.devices.blk import Disk
    from kvmlite.devices.blk.backing import Backing
    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import Virtqueue

QUEUE_SIZE = 256
SPIN_MAX_US = 50.0
_MAX_RATE = 1 << 40
_PHYSICAL_BLOCK_SIZE = 4096  # of nearly all file systems and disks: smaller writes cost them a read


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStatistics:
    """What the guest has asked of its disk since the driver came up.

    Attributes:
        reads, writes, flushes, others: Requests.
        read_bytes, written_bytes: Bytes asked for.
        refused: Requests that made no sense for this disk.
        failed: Requests the host could not do.
        interrupts: Interrupts raised.
        pauses: Times a queue had to wait because of its limits.
    """

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    others: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    refused: int = 0
    failed: int = 0
    interrupts: int = 0
    pauses: int = 0


_COUNTS = (
    "reads",
    "writes",
    "flushes",
    "others",
    "read_bytes",
    "written_bytes",
    "refused",
    "failed",
    "interrupts",
    "pauses",
)


_OWN_ERRORS = {
    lib.KVL_BLK_IRQ_ERROR: "signal the irqfd",
    lib.KVL_BLK_TIMER_ERROR: "set a timer",
    lib.KVL_BLK_RING_ERROR: "submit to io_uring",
}


class _Ring:
    """An io_uring of one queue.

    Raises:
        HostError: The host has none for us.
    """

    def __init__(self) -> None:
        self.native = ffi.new("struct kvl_uring *")
        error = lib.kvl_uring_init(self.native, QUEUE_SIZE)
        if error:
            raise HostError(f"io_uring: {os.strerror(error)}", error)

    def close(self) -> None:
        """Give it back; nothing is under way in it."""
        lib.kvl_uring_deinit(self.native)


class _Queue:
    """One active queue; keeps alive what C points to."""

    def __init__(self, config: Any, queue: Virtqueue, interrupt: Interrupt, ring: _Ring | None) -> None:
        self.virtqueue = queue
        self._interrupt = interrupt
        # A mapping rather than an array of cffi's: with a ring it is large and hardly used.
        self._iov = mmap.mmap(-1, ffi.sizeof("struct iovec") * queue.size * (queue.size if ring else 1))
        self._slots = ffi.new("struct kvl_blk_slot[]", queue.size) if ring else ffi.NULL
        self._buffer = ffi.from_buffer(self._iov)
        self.native = ffi.new("struct kvl_blk *")
        iov = ffi.cast("struct iovec *", self._buffer)
        ring_native = ring.native if ring else ffi.NULL
        lib.kvl_blk_init(self.native, config, queue.native, interrupt.native, iov, ring_native, self._slots)

    def release(self) -> None:
        """Give the mapping back; the worker has stopped."""
        ffi.release(self._buffer)
        self._iov.close()


class VirtioBlk:
    """A disk.

    Args:
        spec: What the user asked for.
        backing: What is behind it; the device's from now on.
        resources: Of the machine. The user is told once of each kind of error of the host.

    Thread: requests on a worker's of each queue; the rest a vCPU's.
    """

    device_id = VIRTIO_ID_BLOCK
    queues_elsewhere = True

    def __init__(self, spec: Disk, backing: Backing, resources: DeviceResources) -> None:
        self.name = resources.name
        self.queue_sizes = (QUEUE_SIZE,) * spec.queues
        self.device_features = _features(spec.read_only, spec.queues)
        self._backing = backing
        self._warn = resources.warn
        self._on_error = resources.on_error
        self._told: set[int] = set()
        self._queues: dict[int, _Queue] = {}
        self._config = ffi.new("struct kvl_blk_config *")
        self._config.disk = backing.native
        self._config.is_read_only = spec.read_only
        self._config.block_size = backing.block_size
        self._config.id = spec.serial.encode().ljust(lib.KVL_BLK_ID_SIZE, b"\x00")
        self._config_space = _config_space(backing, spec.queues)
        self._limiter = _make_limiter(spec)
        self._config.limiter = self._limiter or ffi.NULL
        self._workers: list[QueueWorker] = []
        self._timers: list[TimerFd] = []
        self._rings: list[_Ring] = []
        try:
            for index in range(spec.queues):
                self._add_worker(index)
            self._rings = self._make_rings(spec)
        except BaseException:
            self._close_parts()
            raise

    def _add_worker(self, index: int) -> None:
        on_return, on_stop = self._make_on_return(index), self._make_on_stop(index)
        name = f"{self.name}-{index}"
        self._workers.append(QueueWorker(name, on_return, spin_max_us=SPIN_MAX_US, on_stop=on_stop))
        if self._limiter:
            self._timers.append(TimerFd())

    def _make_rings(self, spec: Disk) -> list[_Ring]:
        if spec.engine == "sync" or spec.overlay:
            return []
        rings: list[_Ring] = []
        try:
            for _ in range(spec.queues):
                rings.append(_Ring())
        except HostError as error:
            for ring in rings:
                ring.close()
            if spec.engine == "io_uring":
                self._warn(f"{self.name}: the host has no io_uring for us ({error}): one request at a time instead")
            return []
        return rings

    @property
    def is_idle(self) -> bool:
        """Whether every request announced before the call is answered. Any thread."""
        return all(worker.is_idle_with(self._holds_nothing) for worker in self._workers)

    def _holds_nothing(self) -> bool:
        return not any(queue.native.is_paused or queue.native.in_flight for queue in self._queues.values())

    def read_config(self, offset: int, size: int) -> bytes:
        """Return configuration space."""
        return read_config_bytes(self._config_space, offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: no field is writable."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Start a thread for each queue in use."""
        self._config.has_flush = bool(driver_features >> VIRTIO_BLK_F_FLUSH & 1)
        started: dict[int, _Queue] = {}
        for index, queue in enumerate(queues):
            if queue.is_stopped:
                continue
            active = _Queue(self._config, queue, interrupt, self._rings[index] if self._rings else None)
            timer = self._timers[index].fd if self._timers else -1
            lib.kvl_blk_add_to_worker(active.native, self._workers[index].native, queue.kick_eventfd, timer)
            started[index] = active
        self._queues = started  # at once: others may be counting
        self._backing.native.is_stopping = 0
        for index in self._queues:
            self._workers[index].start()

    def reset(self) -> None:
        """End the threads; requests under way have ended when this returns, long ones after the step they are at.

        Raises:
            StateError: The host holds one of them, and its thread goes on when it lets go.
        """
        stuck: StateError | None = None
        self._backing.native.is_stopping = 1
        for worker in self._workers:
            try:
                worker.stop()
                lib.kvl_worker_clear(worker.native)
            except StateError as error:  # the others end all the same
                stuck = stuck or error
        if stuck is not None:
            raise stuck
        for queue in self._queues.values():
            queue.release()
        self._queues = {}

    def _make_on_stop(self, index: int) -> Callable[[], None]:
        return lambda: lib.kvl_blk_abandon(self._queues[index].native)

    def _make_on_return(self, index: int) -> Callable[[int, int], bool]:
        return lambda code, source: self._decide(index, code)

    def _decide(self, index: int, code: int) -> bool:
        """Deal with what a worker came back for; on its thread. Returns whether it goes on."""
        queue = self._queues[index]
        try:
            if code in _OWN_ERRORS:
                raise HostError(f"{self.name}: cannot {_OWN_ERRORS[code]}", queue.native.error)
            self._tell(queue.native.error)
            queue.virtqueue.report_native_fault()
        except Exception as error:  # a bug of ours: the machine ends and says so
            self._on_error(error)
            return False
        return True

    def _tell(self, error: int) -> None:
        if error and error not in self._told:
            self._told.add(error)
            self._warn(f"{self.name}: {self._backing.path}: {os.strerror(error)}; the guest sees an I/O error")

    def statistics(self) -> DiskStatistics:
        """Return a snapshot; any thread."""
        counts = [queue.native.stats for queue in self._queues.values()]
        return DiskStatistics(**{name: sum(getattr(stats, name) for stats in counts) for name in _COUNTS})

    def close(self) -> None:
        """End the threads, close and unlock the image."""
        self.reset()
        self._close_parts()
        self._backing.close()

    def _close_parts(self) -> None:
        """Close what the queues share with their workers, which have ended."""
        for worker in self._workers:
            worker.close()
        for timer in self._timers:
            timer.close()
        for ring in self._rings:
            ring.close()


def _make_limiter(spec: Disk) -> Any:
    """``struct kvl_limiter *``, or None if nothing is limited."""
    if not spec.bandwidth and not spec.iops:
        return None
    limiter = ffi.new("struct kvl_limiter *")
    now = lib.kvl_monotonic_ns()
    lib.kvl_limiter_init(limiter)
    for bucket, rate in ((limiter.bytes, spec.bandwidth), (limiter.operations, spec.iops)):
        lib.kvl_bucket_init(ffi.addressof(bucket), min(rate, _MAX_RATE), int(min(rate, _MAX_RATE) * spec.burst_s), now)
    return limiter


def _features(read_only: bool, queues: int) -> int:
    bits = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_FLUSH]
    bits += [VIRTIO_BLK_F_RO] if read_only else [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
    bits += [VIRTIO_BLK_F_MQ] if queues > 1 else []
    return sum(1 << bit for bit in bits)


def _config_space(backing: Backing, queues: int) -> bytes:
    blocks = max(1, _PHYSICAL_BLOCK_SIZE // backing.block_size)
    return VIRTIO_BLK_CONFIG.pack(
        backing.size // SECTOR_SIZE,
        0,  # size_max
        QUEUE_SIZE - 2,  # seg_max: all but header and status
        *(0, 0, 0),  # geometry
        backing.block_size,
        blocks.bit_length() - 1,
        0,  # alignment_offset
        blocks,  # min_io_size
        0,  # opt_io_size
        *(0, 0),  # wce
        queues,
        lib.KVL_BLK_MAX_DISCARD_SECTORS,
        lib.KVL_BLK_MAX_SEGMENTS,
        backing.block_size // SECTOR_SIZE,
        lib.KVL_BLK_MAX_ZERO_SECTORS,
        lib.KVL_BLK_MAX_SEGMENTS,
        1,  # write_zeroes_may_unmap
    )
