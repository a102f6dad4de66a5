"""A device on a transport with a driver in front of it: everything but a guest."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from kvmlite.host.eventfd import EventFd
from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing.driver_queue import DriverQueue
from kvmlite.testing.loop import ManualLoop
from kvmlite.testing.mmio_driver import MmioDriver
from kvmlite.virtio.device import DeviceResources
from kvmlite.virtio.mmio import MmioTransport

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from kvmlite.virtio.device import VirtioDevice

_FIRST_RING = 0x10000
_QUEUE_SPACE = 0x20000  # rings and arena of one queue
_MAX_DRIVER_SIZE = 512
_SETTLE_TIMEOUT_S = 60.0


class VirtioRig:
    """Owns memory, loop, eventfds, transport and device; a context manager.

    Args:
        factory: Makes the device.
        event_idx: Drive the queues with EVENT_IDX.
        indirect: Drive them with indirect tables.
        queue_size: Descriptors per queue, if the device allows as many.
        memory_backing: What its memory is made of.

    Attributes:
        queues: The driver's side of each queue.
        errors: What the transport or the device reported as the machine's fault; a test should find it empty.
        warnings: What the device had to tell the user.
        mapped: Memory the device put into the guest: ``(hva, size, read_only)``, each at its own multiple of 4 GiB.
    """

    def __init__(
        self,
        factory: Callable[[DeviceResources], VirtioDevice],
        *,
        event_idx: bool = False,
        indirect: bool = False,
        queue_size: int = 16,
        memory_backing: str = "anonymous",
    ) -> None:
        self.memory = GuestMemory(8 << 20, backing=memory_backing)
        self.loop = ManualLoop()
        self.errors: list[BaseException] = []
        self.warnings: list[str] = []
        self.mapped: list[tuple[int, int, bool]] = []
        resources = DeviceResources(
            memory=self.memory,
            loop=self.loop,  # type: ignore[arg-type]
            name="device0",
            warn=self.warnings.append,
            on_error=self.errors.append,
            map_memory=self._map_memory,
        )
        with ExitStack() as parts:
            parts.callback(self.memory.close)
            self._eventfds = [parts.enter_context(closing(EventFd()))]
            self.device = factory(resources)
            parts.callback(self.device.close)
            for _ in self.device.queue_sizes:
                self._eventfds.append(parts.enter_context(closing(EventFd())))
            self.irq_eventfd, *kicks = (eventfd.fd for eventfd in self._eventfds)
            self.kick_eventfds = tuple(kicks)
            self.transport = MmioTransport(
                self.device, self.memory, self.loop, self.irq_eventfd, self.kick_eventfds, self.errors.append
            )
            parts.callback(self.transport.close)
            self._parts = parts.pop_all()
        self.driver = MmioDriver(self.transport)
        self.queues = [
            DriverQueue(
                self.memory,
                size=min(size, queue_size, _MAX_DRIVER_SIZE),
                base=_FIRST_RING + index * _QUEUE_SPACE,
                event_idx=event_idx,
                indirect=indirect,
            )
            for index, size in enumerate(self.device.queue_sizes)
        ]

    def _map_memory(self, hva: int, size: int, *, read_only: bool) -> int:
        self.mapped.append((hva, size, read_only))
        return len(self.mapped) << 32

    def __enter__(self) -> VirtioRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back, in the machine's order."""
        self._parts.close()

    def start(self, features: int | None = None) -> None:
        """Bring the driver up with all queues and let the device see them."""
        self.driver.start(self.queues, features)
        self.settle()

    def restart(self) -> None:
        """Reset, empty the rings, bring the driver up again."""
        self.driver.reset()
        for queue in self.queues:
            queue.clear()
        self.start()

    def kick(self, index: int) -> None:
        """Notify as a driver does, and let the loop come to rest."""
        self.driver.notify(index)
        self.settle()

    def settle(self) -> None:
        """Let the loop come to rest, and the device's own threads, if it has some and tells by ``is_idle``."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while True:
            self.loop.run()
            if getattr(self.device, "is_idle", True):
                break
            assert time.monotonic() < deadline, f"{self.device.name} is still busy after {_SETTLE_TIMEOUT_S} s"
            time.sleep(0.0001)
        self.loop.run()

    def take_irq(self) -> int:
        """How often the irqfd was signalled since the last call."""
        try:
            return os.eventfd_read(self.irq_eventfd)
        except BlockingIOError:
            return 0
