"""A queue of a driver as the host's kernel needs to know it."""

from __future__ import annotations

from kvmlite.errors import GuestFault
from kvmlite.host.eventfd import EventFd
from kvmlite.host.vhost import VhostRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.host.loop import DeviceLoop
    from kvmlite.host.vhost import Vhost
    from kvmlite.memory.guest_memory import GuestMemory
    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import Virtqueue


class VhostQueue:
    """One ring of a vhost device: in the kernel's hands between ``start`` and ``stop``.

    Args:
        vhost: The device.
        index: Which of its rings.
        loop: Where the kernel's complaints about the driver are dealt with.

    Thread: ``start``, ``stop`` and ``close`` one at a time.
    """

    def __init__(self, vhost: Vhost, index: int, loop: DeviceLoop) -> None:
        self._vhost = vhost
        self._index = index
        self._loop = loop
        self._errors = EventFd()
        self._queue: Virtqueue | None = None

    def start(self, memory: GuestMemory, queue: Virtqueue, interrupt: Interrupt) -> None:
        """Hand the queue over. It is served when the device is told to begin.

        Raises:
            HostError: The kernel refuses.
        """
        layout = queue.layout
        if layout is None:
            raise ValueError(f"{queue.name}: queue {queue.index} is not in use")
        size = layout.size
        ring = VhostRing(
            size=size,
            desc_hva=memory.to_hva(layout.desc_gpa, 16 * size),
            avail_hva=memory.to_hva(layout.avail_gpa, 6 + 2 * size),
            used_hva=memory.to_hva(layout.used_gpa, 6 + 8 * size),
            kick_fd=queue.kick_eventfd,
            call_fd=interrupt.share(),
            error_fd=self._errors.fd,
        )
        self._vhost.set_ring(self._index, ring)
        self._queue = queue
        self._loop.add_reader(self._errors.fd, self._on_error)

    def _on_error(self) -> None:
        queue = self._queue  # once: another thread may take it back
        if self._errors.drain() and queue is not None:
            queue.fail(GuestFault(f"{queue.name}: queue {queue.index}: the host's kernel cannot follow its rings"))

    def stop(self) -> None:
        """Take the queue back, after the device was told to end. Harmless if it was not started."""
        self.release()
        self.unwatch()

    def release(self) -> None:
        """The kernel's part of ``stop``."""
        if self._queue is not None:
            self._queue = None
            self._vhost.release_ring(self._index)

    def unwatch(self) -> None:
        """Ours. Waits for the loop: not for who holds a lock that the loop may want."""
        self._loop.remove_reader(self._errors.fd)
        self._errors.drain()

    def close(self) -> None:
        """Close what is its own, after ``stop``, or when the device is closed."""
        self.unwatch()
        self._errors.close()
