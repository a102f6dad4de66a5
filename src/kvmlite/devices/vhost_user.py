"""A virtio device whose queues another process serves (vhost-user): what is common to all of them.

The process is started with the device and ended with it. If it dies, or does not do what the protocol says, it is started
again where that makes sense. Requests under way are then taken up by the new one, if both note them in shared memory;
else they fail. Where there is no coming back, every request fails from then on: the guest sees I/O errors, and nobody waits.
"""

from __future__ import annotations

import os
import select
import threading
import time

from kvmlite.abi.virtio import VIRTIO_F_VERSION_1
from kvmlite.errors import GuestFault, HostError, KvmliteError
from kvmlite.host.daemon import END_TIMEOUT_S
from kvmlite.virtio.device import read_config_bytes
from kvmlite.virtio.state import TRANSPORT_FEATURES
from kvmlite.virtio.vhost_user.connection import BackEndError, BackEndGone
from kvmlite.virtio.vhost_user.ledger import Ledger
from kvmlite.virtio.vhost_user.rings import heads_under_way, ring_indices
from kvmlite.virtio.vhost_user.session import HANDSHAKE_TIMEOUT_S, REPLY_TIMEOUT_S, Session, check_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Protocol

    from kvmlite.host.loop import DeviceLoop
    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import DescriptorChain, Virtqueue
    from kvmlite.virtio.vhost_user.session import InflightArea

    class BackEnd(Protocol):
        """The process on the other side, as ``host.daemon.Daemon`` is one."""

        @property
        def name(self) -> str: ...

        @property
        def is_running(self) -> bool: ...

        def watch(self, loop: DeviceLoop, on_end: Callable[[], None]) -> None: ...

        def wait(self, timeout_s: float) -> bool: ...

        def end_text(self) -> str: ...

        def end(self, timeout_s: float = END_TIMEOUT_S) -> None: ...


RESTART_LIMIT = 3
RESTART_WINDOW_S = 60.0
"""A back end that dies more often than that within so many seconds is given up."""

_LAST_WORDS_S = 2.0  # a back end that closes the connection is about to say why, and to end
_VISIT_BUDGET = 128
_JOIN_TIMEOUT_S = 60.0


class VhostUserDevice:
    """One device and the process that serves it.

    Args:
        resources: The machine's.
        start: Starts a back end; returns it and a socket connected to it, both the device's from then on.
        device_id: Device type.
        queue_sizes: Largest size of each queue.
        features: Those of the device's features that may be passed on from the back end to the driver.
        config: The configuration space; or its size, and the back end is asked for it.
        fail: Writes an I/O error into a chain, returns the number of bytes written.
        lost_with_it: Why a new process could not go on where the one before ended; "" if it can.
        in_order: The back end answers in the order of the requests. Else its interrupts pass through a thread that takes down
            what is under way.
        end_timeout_s: How long it may take to put things in order when the machine ends, before it is killed.
        own_features: Of the device, which need nothing of the back end: offered to the driver, and not passed on.
        unanswered: Queues whose chains wait for what comes from outside: nothing is to be answered when it is lost.
        lost_config: The configuration space from the moment on at which the back end is given up; None: as before.
        lost_text: What the guest has to expect from then on.

    Raises:
        ConfigError: Guest memory cannot be shared.
        HostError: The back end cannot be started, or cannot serve the device.

    Thread: ``activate`` and ``reset`` a vCPU's, for at most some seconds; a back end that died is dealt with on a thread of
    its own. The lock is never taken on the device loop.
    """

    queues_elsewhere = True

    def __init__(
        self,
        resources: DeviceResources,
        start: Callable[[], tuple[BackEnd, socket.socket]],
        *,
        device_id: int,
        queue_sizes: tuple[int, ...],
        features: int,
        config: bytes | int,
        fail: Callable[[DescriptorChain], int],
        lost_with_it: str,
        in_order: bool,
        end_timeout_s: float = END_TIMEOUT_S,
        own_features: int = 0,
        unanswered: frozenset[int] = frozenset(),
        lost_config: bytes | None = None,
        lost_text: str = "the guest gets I/O errors from now on",
    ) -> None:
        self.device_id = device_id
        self.name = resources.name
        self.queue_sizes = queue_sizes
        self._resources = resources
        self._start_back_end = start
        self._fail_chain = fail
        self._lost_with_it = lost_with_it
        self._in_order = in_order
        self._end_timeout_s = end_timeout_s
        self._unanswered = unanswered
        self._lost_config = lost_config
        self._lost_text = lost_text
        self._ledger: Ledger | None = None
        self._asks_config = isinstance(config, int)
        self._lock = threading.Lock()
        self._recovery_lock = threading.Lock()  # for the three below; nothing is waited for while it is held
        self._recovery: threading.Thread | None = None
        self._needs_recovery = False
        self._complaint = ""  # what the back end did wrong, if it has not died by itself
        self._is_closed = False
        self._restarts: list[float] = []
        self._queues: tuple[Virtqueue, ...] = ()
        self._interrupt: Interrupt | None = None
        self._driver_features = 0
        self._kick_fds: list[int] = []
        self._call_fd = -1
        self._inflight: InflightArea | None = None
        self._hangup: select.epoll | None = None
        self._session: Session | None = None
        check_memory(resources.memory, self.name)
        self._back_end, session = self._launch(HANDSHAKE_TIMEOUT_S)
        try:
            self._passed_on = session.features & features
            self.device_features = self._passed_on | own_features
            self.transport_features = session.features & TRANSPORT_FEATURES
            self._config = session.read_config(config) if isinstance(config, int) else config
            self._adopt(session)
        except BaseException:
            self._drop_session()
            session.close()
            self._back_end.end()
            raise

    # ---- what the transport calls ----

    def read_config(self, offset: int, size: int) -> bytes:
        """Return configuration space as the back end had it when the device was made."""
        return read_config_bytes(self._config, offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: no field is writable."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Hand the driver's queues to the back end."""
        with self._lock:
            self._queues, self._interrupt, self._driver_features = queues, interrupt, driver_features
            for queue in queues:
                self._kick_fds.append(os.dup(queue.kick_eventfd))
            self._call_fd = os.dup(interrupt.eventfd)
            if not self._in_order:
                self._ledger = Ledger(f"ledger-{self.name}", queues, self._call_fd)
            if self._session is None:
                self._serve_errors()
                return
            try:
                largest = max((queue.size for queue in queues), default=0)
                self._inflight = self._session.open_inflight_area(largest)
                self._start_queues([0] * len(queues))
            except BackEndError as error:
                self._begin_recovery("" if isinstance(error, BackEndGone) else str(error))

    def reset(self) -> None:
        """Take the queues back; nobody touches them when this returns."""
        with self._lock:
            self._stop_serving_errors()
            if self._session is not None and self._session.may_touch_queues and self._back_end.is_running:
                try:
                    self._session.stop(self._queues)
                except BackEndError as error:
                    has_ended = isinstance(error, BackEndGone) and self._back_end.wait(_LAST_WORDS_S)
                    self._back_end.end()
                    self._begin_recovery("" if has_ended else str(error))
            self._forget_driver()

    def close(self) -> None:
        """End the back end."""
        with self._recovery_lock:
            self._is_closed = True
            recovery = self._recovery
        if recovery is not None:
            recovery.join(_JOIN_TIMEOUT_S)
        with self._lock:
            self._stop_serving_errors()
            self._drop_session()
            try:
                self._back_end.end(self._end_timeout_s)
            finally:
                self._forget_driver()

    # ---- the back end ----

    def _launch(self, timeout_s: float) -> tuple[BackEnd, Session]:
        back_end, sock = self._start_back_end()
        try:
            session = Session(sock, back_end.name, len(self.queue_sizes), timeout_s)
        except BackEndError as error:
            has_ended = isinstance(error, BackEndGone) and back_end.wait(_LAST_WORDS_S)
            back_end.end()
            what = f"{back_end.name} {back_end.end_text()}" if has_ended else str(error)
            raise HostError(f"{self.name}: {what}", error.errno or 0) from error
        except BaseException:
            back_end.end()
            raise
        if not session.features >> VIRTIO_F_VERSION_1 & 1:
            session.close()
            back_end.end()
            raise HostError(f"{self.name}: {back_end.name} knows only devices from before VIRTIO 1.0")
        return back_end, session

    def _adopt(self, session: Session) -> None:
        """Use a session, and watch for the end of the process and of the connection."""
        self._session = session
        loop = self._resources.loop
        self._back_end.watch(loop, lambda: self._begin_recovery(""))
        # Replies make the socket readable, too, and they are for whoever asked: an epoll of its own tells of its end only.
        self._hangup = select.epoll()
        self._hangup.register(session.fileno(), select.EPOLLRDHUP)
        loop.add_reader(self._hangup.fileno(), self._hung_up)

    def _hung_up(self) -> None:
        if self._hangup is not None and not self._hangup.closed:
            self._resources.loop.remove_reader(self._hangup.fileno())
        self._begin_recovery("")

    def _drop_session(self) -> None:
        if self._hangup is not None:
            self._resources.loop.remove_reader(self._hangup.fileno())
            self._hangup.close()
            self._hangup = None
        if self._session is not None:
            self._session.close()
            self._session = None

    def _start_queues(self, bases: list[int]) -> None:
        assert self._session is not None
        calls = [self._call_fd] * len(self._queues)
        if self._ledger is not None:
            calls = [self._ledger.call_fd(queue) for queue in self._queues]
            self._ledger.start()
        self._session.start(
            self._resources.memory,
            self._queues,
            driver_features=self._driver_features,
            call_fds=calls,
            kick_fds=self._kick_fds,
            bases=bases,
            inflight=self._inflight,
        )

    def _forget_driver(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
        for fd in (*self._kick_fds, self._call_fd):
            if fd >= 0:
                os.close(fd)
        if self._inflight is not None:
            os.close(self._inflight.fd)
        self._queues, self._interrupt, self._inflight = (), None, None
        self._kick_fds, self._call_fd = [], -1

    # ---- when it has died ----

    def _begin_recovery(self, complaint: str) -> None:
        """Deal with a back end that has died or misbehaved, on another thread. Any thread."""
        with self._recovery_lock:
            if self._is_closed:
                return
            self._needs_recovery = True
            self._complaint = self._complaint or complaint
            if self._recovery is None:
                self._recovery = threading.Thread(target=self._recover, name=f"recover-{self.name}"[:15], daemon=True)
                try:
                    self._recovery.start()
                except RuntimeError:  # the host has no more threads
                    self._recovery = None
                    raise

    def _recover(self) -> None:
        try:
            while self._is_recovery_needed():
                with self._lock:
                    if self._session is not None:
                        self._replace_back_end()
        except BaseException as error:  # a bug of ours: the machine ends and says so
            self._resources.on_error(error)

    def _is_recovery_needed(self) -> bool:
        with self._recovery_lock:
            if self._needs_recovery and not self._is_closed:
                return True
            self._recovery = None
            return False

    def _take_complaint(self) -> str:
        """What was said of the back end that is gone; what is said from now on is about the next one."""
        with self._recovery_lock:
            complaint, self._complaint, self._needs_recovery = self._complaint, "", False
            return complaint

    def _replace_back_end(self) -> None:
        untouched = self._session is None or not self._session.may_touch_queues
        text = self._end_back_end()  # from here on nobody touches the queues
        failure = self._lost_with_it or self._restart()
        resumes = not failure and (untouched or self._inflight is not None)
        failed = 0 if resumes or not self._queues else self._fail_requests()
        if not failure and self._queues:
            try:
                self._start_queues([self._base(queue) for queue in self._queues])
            except BackEndError as error:
                failure = str(error)
                self._end_back_end()
                failed += self._fail_requests()
        if failure:
            if self._queues:
                self._serve_errors()
            self._lose()
            self._warn(f"{text}: {failure}; {self._lost_text}")
        elif failed:
            self._warn(f"{text}; it was started again, {failed} requests that were under way have failed")
        else:
            self._warn(f"{text}; it was started again, and no request was lost")

    def _lose(self) -> None:
        config = self._lost_config
        if config is None:
            return

        def update() -> None:
            self._config = config

        if self._interrupt is None:
            update()
        else:
            self._interrupt.raise_config(update)

    def _warn(self, text: str) -> None:
        self._resources.warn(f"{self.name}: {text}")

    def _end_back_end(self) -> str:
        """Make sure that it has ended and is watched no more; what is to be said about it."""
        back_end = self._back_end
        ended_by_itself = back_end.wait(_LAST_WORDS_S if not self._complaint else 0)
        self._drop_session()
        back_end.end()
        if self._ledger is not None:
            self._ledger.stop()
        complaint = self._take_complaint()
        if complaint:
            return complaint
        if ended_by_itself:
            return f"{back_end.name} {back_end.end_text()}"
        return f"{back_end.name} has closed the connection"

    def _restart(self) -> str:
        """Start a new back end; why not, or ""."""
        now = time.monotonic()
        self._restarts = [moment for moment in self._restarts if now - moment < RESTART_WINDOW_S]
        if len(self._restarts) >= RESTART_LIMIT:
            return f"it has ended {RESTART_LIMIT + 1} times within {RESTART_WINDOW_S:g} s"
        self._restarts.append(now)
        try:
            self._back_end, session = self._launch(REPLY_TIMEOUT_S)
        except KvmliteError as error:
            return f"it cannot be started again ({error})"
        try:
            needed = self._passed_on | self.transport_features
            if session.features & needed != needed or self._has_other_config(session):
                raise BackEndError("it came back as another device")
        except BackEndError as error:
            session.close()
            self._back_end.end()
            return str(error)
        self._adopt(session)
        return ""

    def _has_other_config(self, session: Session) -> bool:
        return self._asks_config and session.read_config(len(self._config)) != self._config

    def _base(self, queue: Virtqueue) -> int:
        """Where a new back end goes on: after the last chain that was given back."""
        if queue.layout is None:
            return 0
        try:
            return ring_indices(self._resources.memory, queue.layout)[1]
        except GuestFault as fault:
            queue.fail(fault)
            return 0

    def _fail_requests(self) -> int:
        """Answer what the dead back end has left unanswered with errors; how many that are."""
        count = 0
        for queue in self._queues:
            if queue.index not in self._unanswered and queue.layout is not None and not queue.is_stopped:
                try:
                    count += self._fail_requests_of(queue)
                except GuestFault as fault:
                    queue.fail(fault)
        return count

    def _fail_requests_of(self, queue: Virtqueue) -> int:
        memory = self._resources.memory
        assert queue.layout is not None
        known = self._ledger.under_way(queue) if self._ledger is not None else None
        if known is not None:
            available, used, heads = known
        else:
            available, used = ring_indices(memory, queue.layout)
            heads = heads_under_way(memory, queue.layout, available, used)
        queue.restore({"version": 1, "last_avail_idx": available, "used_idx": used})
        for head in heads:
            chain = queue.chain_at(head)
            if chain is None:
                break
            queue.add_used(head, self._fail_chain(chain))
        queue.enable_notifications()  # the dead one may have asked for none, or for one at a place that is behind us now
        if self._ledger is not None:
            self._ledger.forget(queue, available)
        self._interrupt_for(queue)
        return len(heads)

    def _interrupt_for(self, queue: Virtqueue) -> None:
        if queue.needs_interrupt() and self._interrupt is not None:
            self._interrupt.raise_queue()

    def _serve_errors(self) -> None:
        """Let the device loop answer every request with an error."""
        for queue, kick_fd in zip(self._queues, self._kick_fds, strict=True):
            if queue.index not in self._unanswered and queue.layout is not None:
                self._resources.loop.add_reader(kick_fd, self._error_server(queue, kick_fd))
                os.eventfd_write(kick_fd, 1)

    def _stop_serving_errors(self) -> None:
        for kick_fd in self._kick_fds:
            self._resources.loop.remove_reader(kick_fd)

    def _error_server(self, queue: Virtqueue, kick_fd: int) -> Callable[[], None]:
        def serve() -> None:
            try:
                os.eventfd_read(kick_fd)
            except BlockingIOError:
                return
            queue.begin_visit(_VISIT_BUDGET)
            try:
                while (chain := queue.pop()) is not None:
                    queue.add_used(chain.head_index, self._fail_chain(chain))
            except GuestFault as fault:
                queue.fail(fault)
            self._interrupt_for(queue)
            if queue.end_visit():
                os.eventfd_write(kick_fd, 1)

        return serve
