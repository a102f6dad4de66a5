"""A device's interrupt: status bits and an eventfd, in C so that workers without Python can raise it."""

from __future__ import annotations

import _thread

from kvmlite._native import ffi, lib
from kvmlite.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class DeviceInterrupt:
    """Interrupt status and configuration generation of one device.

    Args:
        eventfd: An irqfd; the caller's.
        signalled_elsewhere: Others than this object signal it, too: the status then always shows the queue bit while
            the driver is up.

    Thread: any.
    """

    def __init__(self, eventfd: int, *, signalled_elsewhere: bool = False) -> None:
        self._native = ffi.new("struct kvl_irq *")
        lib.kvl_irq_init(self._native, eventfd)
        self._config_lock = _thread.allocate_lock()  # never held while waiting for another thread
        self._generation = 0
        self._is_live = False
        self._always = lib.KVL_IRQ_QUEUE if signalled_elsewhere else 0
        self.eventfd = eventfd
        self.raised = 0

    @property
    def native(self) -> Any:
        """``struct kvl_irq *``, for a worker in C."""
        return self._native

    def raise_queue(self) -> None:
        """See :class:`kvmlite.virtio.device.Interrupt`."""
        self._raise(lib.KVL_IRQ_QUEUE)

    def raise_config(self, update: Callable[[], None] | None = None) -> None:
        """See :class:`kvmlite.virtio.device.Interrupt`."""
        with self._config_lock:
            if update is not None:
                update()
            self._generation = (self._generation + 1) & 0xFFFFFFFF
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
            raise HostError("cannot signal a device's irqfd", error)

    def read_generation(self) -> int:
        """Return the configuration generation."""
        with self._config_lock:
            return self._generation

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
        lib.kvl_irq_set_always(self._native, self._always)

    def disable(self) -> None:
        """Let none through and forget those that wait: the device was reset."""
        self._is_live = False
        lib.kvl_irq_set_always(self._native, 0)
        lib.kvl_irq_ack(self._native, 0xFFFFFFFF)
