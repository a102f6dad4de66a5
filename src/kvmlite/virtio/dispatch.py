"""From a kick to ``process_queue``: the one place where a driver's fault stops its queue and nothing else."""

from __future__ import annotations

import os

from kvmlite.errors import GuestFault
from kvmlite.virtio.device import is_served_on_loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmlite.virtio.device import VirtioDevice
    from kvmlite.virtio.queue import Virtqueue

    class KickLoop(Protocol):
        """What is needed of the device loop."""

        def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
            """Call back while ``fd`` is readable."""

        def remove_reader(self, fd: int) -> None:
            """Forget it; no callback runs afterwards."""


VISIT_BUDGET = 128
"""Chains one visit takes before other descriptors of the loop have their turn."""


class QueueDispatch:
    """Visits the queues of one device when their driver kicks.

    Args:
        device: Whose queues.
        loop: Where the visits take place.
        on_error: Told of an exception that is not the guest's fault; the machine ends.

    Thread: ``start`` and ``stop`` a vCPU's (the transport's lock is held); visits on the device loop.
    """

    def __init__(self, device: VirtioDevice, loop: KickLoop, on_error: Callable[[BaseException], None]) -> None:
        self._process = device.process_queue if is_served_on_loop(device) else None
        self._loop = loop
        self._on_error = on_error
        self._queues: tuple[Virtqueue, ...] = ()
        self.visits = 0

    @property
    def queues(self) -> tuple[Virtqueue, ...]:
        """Those it visits; none before ``prepare`` and after ``stop_queues``."""
        return self._queues

    def prepare(self, queues: tuple[Virtqueue, ...]) -> None:
        """Take the queues over; no visits yet."""
        self._queues = queues

    def start(self) -> None:
        """Watch the kick eventfds, and visit each queue once: buffers may have been there before the driver was up.

        Not those of a device whose queues are served elsewhere.
        """
        if self._process is None:
            return
        for queue in self._queues:
            if not queue.is_stopped:
                self._watch(queue)
                queue.kick()

    def _watch(self, queue: Virtqueue) -> None:
        self._loop.add_reader(queue.kick_eventfd, lambda: self._visit(queue))

    def stop(self) -> None:
        """Visit no more; a visit under way has ended when this returns."""
        if self._process is None:
            return
        for queue in self._queues:
            if queue.kick_eventfd >= 0:
                self._loop.remove_reader(queue.kick_eventfd)

    def stop_queues(self) -> None:
        """Cut the queues off guest memory; after the device itself was reset."""
        for queue in self._queues:
            queue.stop()
        self._queues = ()

    def _visit(self, queue: Virtqueue) -> None:
        assert self._process is not None, "else no kick is watched"
        try:
            os.eventfd_read(queue.kick_eventfd)
        except BlockingIOError:
            return
        if queue.is_broken or queue.is_stopped:
            return
        self.visits += 1
        queue.begin_visit(VISIT_BUDGET)
        try:
            self._process(queue.index)
        except GuestFault as fault:
            queue.fail(fault)
        except Exception as error:  # a bug of ours: the machine ends and says so
            queue.is_broken = True
            self._on_error(error)
        if queue.end_visit():
            queue.kick()
