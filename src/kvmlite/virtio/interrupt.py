"""A device's interrupt: status bits and a line or an eventfd, in C so that workers without Python can raise it."""

from __future__ import annotations

import _thread

from kvmlite._native import ffi, lib
from kvmlite.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmlite.kvm.vm import Vm


class InterruptLine:
    """An interrupt line of a VM, driven by ioctl until an irqfd is bound to it."""

    __slots__ = ("gsi", "vm")

    def __init__(self, vm: Vm, gsi: int) -> None:
        self.vm, self.gsi = vm, gsi


class DeviceInterrupt:
    """Interrupt status and configuration generation of one device.

    Args:
        eventfd: Signalled if there is no line, or once it is shared; the caller's.
        line: Pulsed instead: an irqfd of an IOAPIC pin takes a kernel thread's turn, an ioctl does not.
        status: ``uint32_t *``: where the driver finds the status; of its own if None. Must outlive the device's threads.
        generation: ``uint32_t *``: likewise the configuration generation.

    Thread: any.
    """

    def __init__(
        self, eventfd: int, *, line: InterruptLine | None = None, status: Any = None, generation: Any = None
    ) -> None:
        self._native = ffi.gc(ffi.new("struct kvl_irq *"), lib.kvl_irq_deinit)
        lib.kvl_irq_init(self._native, eventfd)
        lib.kvl_irq_show(self._native, status or ffi.NULL)
        if line is not None:
            lib.kvl_irq_set_line(self._native, line.vm.fd, line.gsi)
        self._line = line
        self._generation = generation or ffi.new("uint32_t *")
        self._config_lock = _thread.allocate_lock()  # never held while waiting for another thread
        self._is_live = False
        self._is_shared = False
        self._eventfd = eventfd
        self.raised = 0

    @property
    def native(self) -> Any:
        """``struct kvl_irq *``, for a worker in C."""
        return self._native

    def share(self) -> int:
        """See :class:`kvmlite.virtio.device.Interrupt`."""
        if not self._is_shared:
            lib.kvl_irq_drop_line(self._native)
            if self._line is not None:
                self._line.vm.add_irqfd(self._eventfd, self._line.gsi)
            self._is_shared = True
        lib.kvl_irq_set_always(self._native, lib.KVL_IRQ_QUEUE)
        return self._eventfd

    def raise_queue(self) -> None:
        """See :class:`kvmlite.virtio.device.Interrupt`."""
        self._raise(lib.KVL_IRQ_QUEUE)

    def raise_config(self, update: Callable[[], None] | None = None) -> None:
        """See :class:`kvmlite.virtio.device.Interrupt`."""
        with self._config_lock:
            if update is not None:
                update()
            self._generation[0] = (self._generation[0] + 1) & 0xFFFFFFFF
        self._raise(lib.KVL_IRQ_CONFIG)

    def raise_needs_reset(self) -> None:
        """Tell the driver to look at the device status (VIRTIO 1.2, 2.1.2)."""
        self._raise(lib.KVL_IRQ_CONFIG)

    def _raise(self, bits: int) -> None:
        if not self._is_live:
            return
        self.raised += 1
        error = lib.kvl_irq_raise(self._native, bits)
        if error:
            raise HostError("cannot interrupt the guest for a device", error)

    def read_config(self, read: Callable[[int, int], bytes], offset: int, size: int) -> bytes:
        """Read configuration space, not in the middle of a change."""
        with self._config_lock:
            return read(offset, size)

    def status(self) -> int:
        """Return the bits not yet acknowledged."""
        return int(lib.kvl_irq_status(self._native))

    def acknowledge(self, bits: int) -> None:
        """Clear bits: the driver has seen them."""
        lib.kvl_irq_ack(self._native, bits)

    def enable(self) -> None:
        """Let interrupts through: the driver is up."""
        self._is_live = True

    def disable(self) -> None:
        """Let none through and forget those that wait: the device was reset."""
        self._is_live = False
        lib.kvl_irq_set_always(self._native, 0)
        lib.kvl_irq_ack(self._native, 0xFFFFFFFF)

    def detach(self) -> None:
        """Let go of the words the driver saw, which are about to go. No driver comes up any more."""
        self.disable()
        with self._config_lock:
            lib.kvl_irq_show(self._native, ffi.NULL)
            self._generation = ffi.new("uint32_t *")
