"""The life of a virtio device as its driver drives it, whatever the transport: status, features, queues, reset.

::

    0 --ACKNOWLEDGE--> 1 --DRIVER--> 3 --FEATURES_OK--> 11 --DRIVER_OK--> 15      0 written: back to the start
                                     features may change    queues may change     FAILED: only a reset helps

DEVICE_NEEDS_RESET is the device's own bit, set when the driver broke a rule (VIRTIO 1.2, 2.1.2).
"""

from __future__ import annotations

import _thread
import os

from kvmlite.abi.virtio import (
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    DeviceStatus,
)
from kvmlite.errors import GuestFault
from kvmlite.virtio.dispatch import QueueDispatch
from kvmlite.virtio.queue import QueueLayout, Virtqueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.memory.guest_memory import GuestMemory
    from kvmlite.virtio.device import VirtioDevice
    from kvmlite.virtio.dispatch import KickLoop
    from kvmlite.virtio.interrupt import DeviceInterrupt

TRANSPORT_FEATURES = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC

_ACKNOWLEDGE = int(DeviceStatus.ACKNOWLEDGE)
_DRIVER = int(DeviceStatus.DRIVER)
_FEATURES_OK = int(DeviceStatus.FEATURES_OK)
_DRIVER_OK = int(DeviceStatus.DRIVER_OK)
_NEEDS_RESET = int(DeviceStatus.NEEDS_RESET)
_FAILED = int(DeviceStatus.FAILED)

# The driver's steps in order (VIRTIO 1.2, 3.1.1); each needs all before it.
_STEPS = (_ACKNOWLEDGE, _DRIVER, _FEATURES_OK, _DRIVER_OK)
_NEEDS = {
    _ACKNOWLEDGE: 0,
    _DRIVER: _ACKNOWLEDGE,
    _FEATURES_OK: _ACKNOWLEDGE | _DRIVER,
    _DRIVER_OK: _ACKNOWLEDGE | _DRIVER | _FEATURES_OK,
}
_DRIVER_BITS = _ACKNOWLEDGE | _DRIVER | _FEATURES_OK | _DRIVER_OK | _FAILED

_INVENTED = 1 << 64  # stands for any feature bit beyond 63: none is offered


class QueueSetup:
    """What the driver has written about one queue so far."""

    __slots__ = ("avail_gpa", "desc_gpa", "is_ready", "max_size", "size", "used_gpa")

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.clear()

    def clear(self) -> None:
        """Back to what a reset leaves."""
        self.size = self.desc_gpa = self.avail_gpa = self.used_gpa = 0
        self.is_ready = False


class VirtioState:
    """One device, its driver's progress, and the machinery between them.

    Args:
        device: The device.
        memory: Guest RAM.
        loop: Where its queues are served.
        interrupt: How it reaches its driver.
        show_status: Given the device status each time it changes, for the driver to read. Any thread, one at a time.
        kick_eventfds: One per queue, nonblocking; the caller's.
        on_error: Told of an exception that is not the guest's fault. Any thread; must not block.

    Thread: a vCPU's, one at a time (the transport's lock); ``fault`` any.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        loop: KickLoop,
        *,
        interrupt: DeviceInterrupt,
        show_status: Callable[[int], None],
        kick_eventfds: tuple[int, ...],
        on_error: Callable[[BaseException], None],
    ) -> None:
        if len(kick_eventfds) != len(device.queue_sizes):
            raise ValueError(f"{device.name}: {len(kick_eventfds)} kick eventfds, {len(device.queue_sizes)} queues")
        self.device = device
        self.interrupt = interrupt
        self.dispatch = QueueDispatch(device, loop, on_error)
        self.queues = tuple(QueueSetup(size) for size in device.queue_sizes)
        self.device_features = device.device_features | getattr(device, "transport_features", TRANSPORT_FEATURES)
        self.driver_features = 0
        self.faults = 0
        self.last_fault = ""
        self.refused = 0  # status and setup writes out of order
        self._memory = memory
        self._kick_eventfds = kick_eventfds
        self._on_error = on_error
        self._show_status = show_status
        self._status_lock = _thread.allocate_lock()  # innermost: between looking at the status and showing it
        self._status = 0
        self._needs_reset = False  # apart from the status: set on any thread
        self._is_activated = False

    @property
    def status(self) -> int:
        """Device status, as the driver reads it."""
        return self._status | (_NEEDS_RESET if self._needs_reset else 0)

    def _show(self) -> None:
        with self._status_lock:
            self._show_status(self.status)

    @property
    def is_active(self) -> bool:
        """Whether the device has its queues."""
        return self._is_activated

    def write_status(self, value: int) -> None:
        """Take the driver's steps; 0 resets. A step out of order, or back, is ignored and counted.

        Spec: VIRTIO 1.2, 2.1.1 and 3.1.1.
        """
        if value == 0:
            self.reset()
        else:
            self._take_steps(value)
            self._show()

    def _take_steps(self, value: int) -> None:
        value &= _DRIVER_BITS
        if self._status & ~value or self._status & _FAILED:
            self.refused += 1
            return
        for step in _STEPS:
            if value & step and not self._status & step and not self._take_step(step):
                self.refused += 1
                break
        self._status |= value & _FAILED

    def _take_step(self, step: int) -> bool:
        if self._status & _NEEDS[step] != _NEEDS[step]:
            return False
        if step == _FEATURES_OK and not self._accepts_features():
            return False
        self._status |= step
        if step == _DRIVER_OK:
            self._activate()
        return True

    def _accepts_features(self) -> bool:
        has_version_1 = bool(self.driver_features >> VIRTIO_F_VERSION_1 & 1)
        return has_version_1 and not self.driver_features & ~self.device_features

    def read_features(self, selector: int) -> int:
        """Return 32 device feature bits."""
        return self.device_features >> 32 * selector & 0xFFFFFFFF if selector < 2 else 0

    def write_features(self, selector: int, value: int) -> None:
        """Store 32 driver feature bits; only between DRIVER and FEATURES_OK."""
        if not self._status & _DRIVER or self._status & (_FEATURES_OK | _FAILED):
            self.refused += 1
        elif selector < 2:
            kept = self.driver_features & ~(0xFFFFFFFF << 32 * selector)
            self.driver_features = kept | (value & 0xFFFFFFFF) << 32 * selector
        elif value:
            self.driver_features |= _INVENTED

    def queue_to_set_up(self, index: int) -> QueueSetup | None:
        """Return the queue, if the driver may set it up now; else count.

        That is after FEATURES_OK, before DRIVER_OK: a queue in use never changes under the device.
        """
        may_set_up = self._status & (_FEATURES_OK | _DRIVER_OK | _FAILED) == _FEATURES_OK
        if index < len(self.queues) and may_set_up:
            return self.queues[index]
        self.refused += 1
        return None

    def notify(self, index: int) -> None:
        """Kick a queue; harmless at any time. Needs no lock."""
        if self._is_activated and index < len(self._kick_eventfds):
            try:
                os.eventfd_write(self._kick_eventfds[index], 1)
            except OSError as error:
                self._on_error(error)

    def read_config(self, offset: int, size: int) -> bytes:
        """Read the device's configuration space; exactly ``size`` bytes."""
        try:
            data = self.interrupt.read_config(self.device.read_config, offset, size)
        except Exception as error:  # a bug of ours: the machine ends, the vCPU that exited must not
            self._on_error(error)
            data = b""
        return data[:size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand a write of configuration space to the device, once there is a driver."""
        if not self._status & _DRIVER:
            self.refused += 1
            return
        self._guarded(lambda: self.device.write_config(offset, data))

    def _activate(self) -> None:
        self.interrupt.enable()
        self._guarded(self._start_device)

    def _start_device(self) -> None:
        queues = tuple(self._make_queue(index) for index in range(len(self.queues)))
        self._is_activated = True
        self.dispatch.prepare(queues)
        self.device.activate(queues, self.interrupt, self.driver_features)
        self.dispatch.start()

    def _make_queue(self, index: int) -> Virtqueue:
        setup = self.queues[index]
        layout = None
        if setup.is_ready:
            if setup.size > setup.max_size:
                raise GuestFault(f"{self.device.name}: queue {index}: size {setup.size}, allowed are {setup.max_size}")
            layout = QueueLayout(
                size=setup.size,
                desc_gpa=setup.desc_gpa,
                avail_gpa=setup.avail_gpa,
                used_gpa=setup.used_gpa,
                event_idx=bool(self.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1),
                indirect=bool(self.driver_features >> VIRTIO_RING_F_INDIRECT_DESC & 1),
            )
        return Virtqueue(
            self._memory,
            layout,
            name=self.device.name,
            index=index,
            kick_eventfd=self._kick_eventfds[index],
            on_fault=self.fault,
        )

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            function()
        except GuestFault as fault:
            self.fault(fault)
        except Exception as error:  # a bug of ours: the machine ends, the vCPU that exited must not
            self._on_error(error)

    def fault(self, fault: GuestFault) -> None:
        """Ask the driver for a reset, because it broke a rule. Any thread.

        Spec: VIRTIO 1.2, 2.1.2.
        """
        self.faults += 1
        self.last_fault = str(fault)
        self._needs_reset = True
        self._show()
        self.interrupt.raise_needs_reset()

    def reset(self) -> None:
        """Quiesce the device, then forget all about its driver.

        Spec: VIRTIO 1.2, 2.4.
        """
        if self._is_activated:
            self._guarded(self._stop_device)
            self.dispatch.stop_queues()
        self.interrupt.disable()
        self._is_activated = self._needs_reset = False
        self._status = self.driver_features = 0
        for queue in self.queues:
            queue.clear()
        self._show()

    def _stop_device(self) -> None:
        self.dispatch.stop()
        self.device.reset()
