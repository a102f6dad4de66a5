"""The MMIO transport: a register file in front of :class:`VirtioState` (VIRTIO 1.2, 4.2.2, version 2).

What a driver may read is kept in memory, one word per register, and brought up to date whenever it changes. So it does not
matter whether a load comes here or the guest reads that memory by itself (``machine/register_pages.py``, ADR 9).
"""

from __future__ import annotations

import _thread

from kvmlite._native import ffi
from kvmlite.abi.virtio_mmio import (
    VIRTIO_MMIO_MAGIC,
    VIRTIO_MMIO_SIZE,
    VIRTIO_MMIO_VERSION_2,
    MmioRegister,
)
from kvmlite.records import dataclass
from kvmlite.virtio.interrupt import DeviceInterrupt
from kvmlite.virtio.state import VirtioState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmlite.memory.guest_memory import GuestMemory
    from kvmlite.virtio.device import VirtioDevice
    from kvmlite.virtio.dispatch import KickLoop
    from kvmlite.virtio.interrupt import InterruptLine
    from kvmlite.virtio.state import QueueSetup

VENDOR_ID = 0x4C4D564B  # "KVML", little-endian

_CONFIG = int(MmioRegister.CONFIG)
_QUEUE_NOTIFY = int(MmioRegister.QUEUE_NOTIFY)
_INTERRUPT_STATUS = int(MmioRegister.INTERRUPT_STATUS)
_WIDTHS = (1, 2, 4, 8)

# Registers that read as something, and what they start with; the others are zeros.
_READABLE = {
    MmioRegister.MAGIC_VALUE: VIRTIO_MMIO_MAGIC,
    MmioRegister.VERSION: VIRTIO_MMIO_VERSION_2,
    MmioRegister.DEVICE_ID: 0,
    MmioRegister.VENDOR_ID: VENDOR_ID,
    MmioRegister.DEVICE_FEATURES: 0,
    MmioRegister.QUEUE_NUM_MAX: 0,
    MmioRegister.QUEUE_READY: 0,
    MmioRegister.INTERRUPT_STATUS: 0,
    MmioRegister.STATUS: 0,
    # Length and address of a shared memory region that does not exist are all ones (4.2.2), whichever is selected.
    MmioRegister.SHM_LEN_LOW: 0xFFFFFFFF,
    MmioRegister.SHM_LEN_HIGH: 0xFFFFFFFF,
    MmioRegister.SHM_BASE_LOW: 0xFFFFFFFF,
    MmioRegister.SHM_BASE_HIGH: 0xFFFFFFFF,
    MmioRegister.CONFIG_GENERATION: 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtioStatistics:
    """What happened between a device and its driver so far.

    Attributes:
        reads, writes: Register and configuration accesses that left the guest. Most register reads do not.
        ignored: Of these, accesses that mean nothing: unknown offset, odd width, read-only or write-only register.
        refused: Writes out of order: a step of initialisation too early, queue setup while the queue is in use.
        visits: Times a queue was served.
        interrupts: Interrupts raised.
        faults: Times the driver broke a rule and was asked for a reset.
        last_fault: What it did, or "".
    """

    reads: int
    writes: int
    ignored: int
    refused: int
    visits: int
    interrupts: int
    faults: int
    last_fault: str


class MmioTransport:
    """Registers of one virtio-mmio device; a ``BusDevice``.

    No access raises, whatever its offset, width and value: what means nothing reads as 0 and is counted.

    Args:
        device: The device.
        memory: Guest RAM.
        loop: Where its queues are served.
        interrupt_eventfd: Signalled if there is no ``line``; an irqfd once it is shared. The caller's.
        kick_eventfds: One per queue, nonblocking, normally bound to QueueNotify by ioeventfd; the caller's.
        on_error: Told of an exception that is not the guest's fault. Any thread; must not block.
        line: The device's interrupt line.
        registers: ``uint32_t *``, as many zeros as there are bytes before configuration space: where to keep what the
            driver may read. Of its own if None. Must outlive the device's threads.

    Thread: accesses on any vCPU's, one at a time under a lock; the device loop never takes that lock, so that a
    reset can wait for the loop.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        loop: KickLoop,
        interrupt_eventfd: int,
        kick_eventfds: tuple[int, ...],
        on_error: Callable[[BaseException], None],
        *,
        line: InterruptLine | None = None,
        registers: Any = None,
    ) -> None:
        self._words = registers or ffi.new("uint32_t[]", _CONFIG // 4)
        for register, value in _READABLE.items():
            self._show(register, value)
        self._show(MmioRegister.DEVICE_ID, device.device_id)
        self.state = VirtioState(
            device,
            memory,
            loop,
            interrupt=DeviceInterrupt(
                interrupt_eventfd,
                line=line,
                status=self._words + MmioRegister.INTERRUPT_STATUS // 4,
                generation=self._words + MmioRegister.CONFIG_GENERATION // 4,
            ),
            show_status=lambda status: self._show(MmioRegister.STATUS, status),
            kick_eventfds=kick_eventfds,
            on_error=on_error,
        )
        self._lock = _thread.allocate_lock()
        self._device_features_sel = self._driver_features_sel = self._queue_sel = 0
        self._reads = self._writes = self._ignored = 0
        self._writers = self._make_writers()
        self._show_selected()

    def _show(self, register: MmioRegister, value: int) -> None:
        self._words[register // 4] = value

    def _show_selected(self) -> None:
        """Bring up to date what depends on the selectors."""
        queue = self._selected() if self._selects_queue() else None
        self._show(MmioRegister.DEVICE_FEATURES, self.state.read_features(self._device_features_sel))
        self._show(MmioRegister.QUEUE_NUM_MAX, queue.max_size if queue else 0)
        self._show(MmioRegister.QUEUE_READY, int(queue is not None and queue.is_ready))

    def _make_writers(self) -> dict[int, Callable[[int], None]]:
        state = self.state
        return {
            MmioRegister.DEVICE_FEATURES_SEL: self._select_device_features,
            MmioRegister.DRIVER_FEATURES: lambda value: state.write_features(self._driver_features_sel, value),
            MmioRegister.DRIVER_FEATURES_SEL: self._select_driver_features,
            MmioRegister.QUEUE_SEL: self._select_queue,
            MmioRegister.QUEUE_NUM: lambda value: self._set_queue("size", value),
            MmioRegister.QUEUE_READY: self._write_ready,
            MmioRegister.INTERRUPT_ACK: state.interrupt.acknowledge,
            MmioRegister.STATUS: self._write_status,
            MmioRegister.QUEUE_DESC_LOW: lambda value: self._set_address("desc_gpa", 0, value),
            MmioRegister.QUEUE_DESC_HIGH: lambda value: self._set_address("desc_gpa", 32, value),
            MmioRegister.QUEUE_AVAIL_LOW: lambda value: self._set_address("avail_gpa", 0, value),
            MmioRegister.QUEUE_AVAIL_HIGH: lambda value: self._set_address("avail_gpa", 32, value),
            MmioRegister.QUEUE_USED_LOW: lambda value: self._set_address("used_gpa", 0, value),
            MmioRegister.QUEUE_USED_HIGH: lambda value: self._set_address("used_gpa", 32, value),
            MmioRegister.SHM_SEL: lambda value: None,  # there is no region, whichever is selected
        }

    def read(self, offset: int, size: int) -> int:
        """Answer a load of the guest."""
        with self._lock:
            self._reads += 1
            if offset >= _CONFIG and _fits(offset, size):
                return int.from_bytes(self.state.read_config(offset - _CONFIG, size), "little")
            if size == 4 and offset == _INTERRUPT_STATUS:
                return self.state.interrupt.status()  # what waits in the ring of acknowledgements counts
            if size == 4 and offset in _READABLE:
                return int(self._words[offset // 4])
            self._ignored += 1
            return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a store of the guest."""
        if offset == _QUEUE_NOTIFY and size == 4:
            self._writes += 1
            self.state.notify(value & 0xFFFFFFFF)
            return
        with self._lock:
            self._writes += 1
            if offset >= _CONFIG and _fits(offset, size):
                data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                self.state.write_config(offset - _CONFIG, data)
                return
            writer = self._writers.get(offset) if size == 4 else None
            if writer is not None:
                writer(value & 0xFFFFFFFF)
                self._show_selected()
            else:
                self._ignored += 1

    def _selects_queue(self) -> bool:
        return self._queue_sel < len(self.state.queues)

    def _selected(self) -> QueueSetup:
        return self.state.queues[self._queue_sel]

    def _select_device_features(self, value: int) -> None:
        self._device_features_sel = value

    def _select_driver_features(self, value: int) -> None:
        self._driver_features_sel = value

    def _select_queue(self, value: int) -> None:
        self._queue_sel = value

    def _set_queue(self, field: str, value: int) -> None:
        queue = self.state.queue_to_set_up(self._queue_sel)
        if queue is None:
            return
        if queue.is_ready:
            self.state.refused += 1
        else:
            setattr(queue, field, value)

    def _set_address(self, field: str, shift: int, value: int) -> None:
        if self._selects_queue():
            kept = getattr(self._selected(), field) & ~(0xFFFFFFFF << shift)
            value = kept | value << shift
        self._set_queue(field, value)

    def _write_ready(self, value: int) -> None:
        queue = self.state.queue_to_set_up(self._queue_sel)
        if queue is not None:
            queue.is_ready = bool(value & 1)

    def _write_status(self, value: int) -> None:
        self.state.write_status(value)
        if value == 0:
            self._device_features_sel = self._driver_features_sel = self._queue_sel = 0

    def statistics(self) -> VirtioStatistics:
        """Return a snapshot; any thread."""
        state = self.state
        return VirtioStatistics(
            reads=self._reads,
            writes=self._writes,
            ignored=self._ignored,
            refused=state.refused,
            visits=state.dispatch.visits,
            interrupts=state.interrupt.raised,
            faults=state.faults,
            last_fault=state.last_fault,
        )

    def close(self) -> None:
        """Serve no queue any more. Once; vCPUs and the device loop have stopped."""
        self.state.interrupt.disable()
        self.state.dispatch.stop()
        if self.state.is_active and self.state.device.queues_elsewhere:
            self.state.device.reset()  # before the eventfds that its threads use are closed
        self.state.dispatch.stop_queues()
        self.state.interrupt.detach()
        self._words = ffi.new("uint32_t[]", _CONFIG // 4)  # who still has the device may do things that would be shown


def _fits(offset: int, size: int) -> bool:
    return size in _WIDTHS and offset + size <= VIRTIO_MMIO_SIZE
