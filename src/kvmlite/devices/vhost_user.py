"""A virtio device whose queues another process serves (vhost-user): what is common to all of them.

The process is started with the device and ended with it. If it dies, or does not do what the protocol says, it is started
again where that makes sense. Requests under way are then taken up by the new one, if both note them in shared memory;
else they fail. Where there is no coming back, every request fails from then on: the guest sees I/O errors, and nobody waits.
"""

from __future__ import annotations

import os
import select
import threading

from kvmlite.abi.virtio import VIRTIO_F_VERSION_1
from kvmlite.devices.vhost_user_loss import Recovery, StandIn
from kvmlite.errors import HostError, KvmliteError
from kvmlite.host.daemon import END_TIMEOUT_S
from kvmlite.virtio.device import read_config_bytes
from kvmlite.virtio.state import TRANSPORT_FEATURES
from kvmlite.virtio.vhost_user.connection import BackEndError, BackEndGone
from kvmlite.virtio.vhost_user.ledger import Ledger
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


_LAST_WORDS_S = 2.0  # a back end that closes the connection is about to say why, and to end


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
        self._recovery = Recovery(resources, self._recover)
        self._stand_in: StandIn | None = None  # while there is a driver
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
            self._recovery.close()
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
            self._call_fd = os.dup(interrupt.share())
            if not self._in_order:
                self._ledger = Ledger(f"ledger-{self.name}", queues, self._call_fd)
            self._stand_in = StandIn(
                self._resources,
                queues,
                self._kick_fds,
                interrupt,
                self._ledger,
                fail=self._fail_chain,
                unanswered=self._unanswered,
            )
            if self._session is None:
                self._stand_in.serve()
                return
            try:
                largest = max((queue.size for queue in queues), default=0)
                self._inflight = self._session.open_inflight_area(largest)
                self._start_queues([0] * len(queues))
            except BackEndError as error:
                self._recovery.begin("" if isinstance(error, BackEndGone) else str(error))

    def reset(self) -> None:
        """Take the queues back; nobody touches them when this returns."""
        with self._lock:
            self._stop_stand_in()
            if self._session is not None and self._session.may_touch_queues and self._back_end.is_running:
                try:
                    self._session.stop(self._queues)
                except BackEndError as error:
                    has_ended = isinstance(error, BackEndGone) and self._back_end.wait(_LAST_WORDS_S)
                    self._back_end.end()
                    self._recovery.begin("" if has_ended else str(error))
            self._forget_driver()

    def close(self) -> None:
        """End the back end."""
        self._recovery.close()
        with self._lock:
            self._stop_stand_in()
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
        self._back_end.watch(loop, lambda: self._recovery.begin(""))
        # Replies make the socket readable, too, and they are for whoever asked: an epoll of its own tells of its end only.
        self._hangup = select.epoll()
        self._hangup.register(session.fileno(), select.EPOLLRDHUP)
        loop.add_reader(self._hangup.fileno(), self._hung_up)

    def _hung_up(self) -> None:
        if self._hangup is not None and not self._hangup.closed:
            self._resources.loop.remove_reader(self._hangup.fileno())
        self._recovery.begin("")

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

    def _stop_stand_in(self) -> None:
        if self._stand_in is not None:
            self._stand_in.stop()

    def _forget_driver(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
        for fd in (*self._kick_fds, self._call_fd):
            if fd >= 0:
                os.close(fd)
        if self._inflight is not None:
            os.close(self._inflight.fd)
        self._queues, self._interrupt, self._inflight, self._stand_in = (), None, None, None
        self._kick_fds, self._call_fd = [], -1

    # ---- when it has died ----

    def _recover(self) -> None:
        with self._lock:
            if self._session is not None:
                self._replace_back_end()

    def _replace_back_end(self) -> None:
        untouched = self._session is None or not self._session.may_touch_queues
        text = self._end_back_end()  # from here on nobody touches the queues
        failure = self._lost_with_it or self._restart()
        resumes = not failure and (untouched or self._inflight is not None)
        stand_in = self._stand_in
        failed = 0 if resumes or stand_in is None else stand_in.fail_requests()
        if not failure and stand_in is not None:
            try:
                self._start_queues(stand_in.bases())
            except BackEndError as error:
                failure = str(error)
                self._end_back_end()
                failed += stand_in.fail_requests()
        if failure:
            if stand_in is not None:
                stand_in.serve()
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
        ended_by_itself = back_end.wait(_LAST_WORDS_S if not self._recovery.complaint else 0)
        self._drop_session()
        back_end.end()
        if self._ledger is not None:
            self._ledger.stop()
        complaint = self._recovery.take_complaint()
        if complaint:
            return complaint
        if ended_by_itself:
            return f"{back_end.name} {back_end.end_text()}"
        return f"{back_end.name} has closed the connection"

    def _restart(self) -> str:
        """Start a new back end; why not, or ""."""
        if refusal := self._recovery.note_restart():
            return refusal
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
