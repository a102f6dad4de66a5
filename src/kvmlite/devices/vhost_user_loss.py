"""When the process that serves a device is lost (vhost-user): who sees to it, and what becomes of the driver's queues."""

from __future__ import annotations

import os
import threading
import time

from kvmlite.errors import GuestFault
from kvmlite.virtio.vhost_user.rings import heads_under_way, ring_indices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import DescriptorChain, Virtqueue
    from kvmlite.virtio.vhost_user.ledger import Ledger

RESTART_LIMIT = 3
RESTART_WINDOW_S = 60.0
"""A back end that dies more often than that within so many seconds is given up."""

_VISIT_BUDGET = 128
_JOIN_TIMEOUT_S = 60.0


class Recovery:
    """Sees to losses, one after the other, on a thread that is there while there is one to see to.

    Args:
        resources: The device's.
        recover: Deals with a loss; takes the complaint.

    Thread: ``begin`` any; the rest as the device does.
    """

    def __init__(self, resources: DeviceResources, recover: Callable[[], None]) -> None:
        self._name = resources.name
        self._on_error = resources.on_error
        self._recover = recover
        self._lock = threading.Lock()  # for the four below; nothing is waited for while it is held
        self._thread: threading.Thread | None = None
        self._is_needed = False
        self._is_closed = False
        self._complaint = ""
        self._restarts: list[float] = []

    def begin(self, complaint: str) -> None:
        """Deal with a back end that has died ("") or misbehaved, on another thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_needed = True
            self._complaint = self._complaint or complaint
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"recover-{self._name}"[:15], daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the host has no more threads
                    self._thread = None
                    raise

    @property
    def complaint(self) -> str:
        """What the back end did wrong, if it has not died by itself."""
        return self._complaint

    def take_complaint(self) -> str:
        """What was said of the back end that is gone; what is said from now on is about the next one."""
        with self._lock:
            complaint, self._complaint, self._is_needed = self._complaint, "", False
            return complaint

    def note_restart(self) -> str:
        """Take down that a back end is about to be started again; why it may not be, or ""."""
        now = time.monotonic()
        self._restarts = [moment for moment in self._restarts if now - moment < RESTART_WINDOW_S]
        if len(self._restarts) >= RESTART_LIMIT:
            return f"it has ended {RESTART_LIMIT + 1} times within {RESTART_WINDOW_S:g} s"
        self._restarts.append(now)
        return ""

    def close(self) -> None:
        """See to no more; waits for what is being seen to."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        if thread is not None:
            thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while self._goes_on():
                self._recover()
        except BaseException as error:  # a bug of ours: the machine ends and says so
            self._on_error(error)

    def _goes_on(self) -> bool:
        with self._lock:
            if self._is_needed and not self._is_closed:
                return True
            self._thread = None
            return False


class StandIn:
    """Answers one driver's requests with errors, in the place of a back end that is gone.

    Args:
        resources: The device's.
        queues: The driver's.
        kick_fds: Where it kicks each of them; the caller's.
        interrupt: The device's.
        ledger: Knows what is under way; None: the back end answers in order, and the rings tell.
        fail: Writes an I/O error into a chain, returns the number of bytes written.
        unanswered: Queues whose chains nobody waits for.

    Thread: the device's, while no back end touches the queues. ``serve`` goes on on the device loop.
    """

    def __init__(
        self,
        resources: DeviceResources,
        queues: tuple[Virtqueue, ...],
        kick_fds: list[int],
        interrupt: Interrupt,
        ledger: Ledger | None,
        *,
        fail: Callable[[DescriptorChain], int],
        unanswered: frozenset[int],
    ) -> None:
        self._memory = resources.memory
        self._loop = resources.loop
        self._queues = queues
        self._kick_fds = kick_fds
        self._interrupt = interrupt
        self._ledger = ledger
        self._fail = fail
        self._unanswered = unanswered

    def bases(self) -> list[int]:
        """Where a new back end goes on in each queue: after the last chain that was given back."""
        return [self._base(queue) for queue in self._queues]

    def fail_requests(self) -> int:
        """Answer what the dead back end has left unanswered; how many requests that are."""
        count = 0
        for queue in self._queues:
            if self._answers(queue) and not queue.is_stopped:
                try:
                    count += self._fail_requests_of(queue)
                except GuestFault as fault:
                    queue.fail(fault)
        return count

    def serve(self) -> None:
        """Answer every request from now on."""
        for queue, kick_fd in zip(self._queues, self._kick_fds, strict=True):
            if self._answers(queue):
                self._loop.add_reader(kick_fd, self._server(queue, kick_fd))
                os.eventfd_write(kick_fd, 1)

    def stop(self) -> None:
        """Answer no more; harmless when it does not serve."""
        for kick_fd in self._kick_fds:
            self._loop.remove_reader(kick_fd)

    def _answers(self, queue: Virtqueue) -> bool:
        return queue.index not in self._unanswered and queue.layout is not None

    def _base(self, queue: Virtqueue) -> int:
        if queue.layout is None:
            return 0
        try:
            return ring_indices(self._memory, queue.layout)[1]
        except GuestFault as fault:
            queue.fail(fault)
            return 0

    def _fail_requests_of(self, queue: Virtqueue) -> int:
        assert queue.layout is not None
        known = self._ledger.under_way(queue) if self._ledger is not None else None
        if known is not None:
            available, used, heads = known
        else:
            available, used = ring_indices(self._memory, queue.layout)
            heads = heads_under_way(self._memory, queue.layout, available, used)
        queue.restore({"version": 1, "last_avail_idx": available, "used_idx": used})
        for head in heads:
            chain = queue.chain_at(head)
            if chain is None:
                break
            queue.add_used(head, self._fail(chain))
        queue.enable_notifications()  # the dead one may have asked for none, or for one at a place that is behind us now
        if self._ledger is not None:
            self._ledger.forget(queue, available)
        self._interrupt_for(queue)
        return len(heads)

    def _interrupt_for(self, queue: Virtqueue) -> None:
        if queue.needs_interrupt():
            self._interrupt.raise_queue()

    def _server(self, queue: Virtqueue, kick_fd: int) -> Callable[[], None]:
        def serve() -> None:
            try:
                os.eventfd_read(kick_fd)
            except BlockingIOError:
                return
            queue.begin_visit(_VISIT_BUDGET)
            try:
                while (chain := queue.pop()) is not None:
                    queue.add_used(chain.head_index, self._fail(chain))
            except GuestFault as fault:
                queue.fail(fault)
            self._interrupt_for(queue)
            if queue.end_visit():
                os.eventfd_write(kick_fd, 1)

        return serve
