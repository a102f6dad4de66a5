"""A queue pair and the thread that serves it in C (``net.c``)."""

from __future__ import annotations

from kvmlite._native import ffi, lib
from kvmlite.abi.virtio_net import VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF
from kvmlite.devices.net.features import has
from kvmlite.host.timer import TimerFd
from kvmlite.virtio.worker import QueueWorker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import Virtqueue

LARGE_ROOM = 65562  # header, Ethernet header, 64 KiB of IP
_SMALL_OVERHEAD = 12 + 14 + 4


class WorkerPair:
    """One pair of queues, one thread.

    Args:
        name: Of the thread.
        fd: Where its frames come from and go to; the port's.
        framing: As in ``NetPort``.
        egress: As in ``NetPort``.
        limiters: ``struct kvl_limiter *`` for what is received and for what is sent, or NULL.
        on_lost: Told, once, why no more frames can come or go. On the worker's thread.
        on_error: Told of an exception that is a bug of ours.

    Thread: ``start``, ``stop`` and ``close`` one at a time, on any but the worker's.
    """

    def __init__(
        self,
        name: str,
        fd: int,
        framing: str,
        egress: Any,
        limiters: tuple[Any, Any],
        *,
        on_lost: Callable[[str], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._name = name
        self._on_lost = on_lost
        self._on_error = on_error
        self._queues: tuple[Virtqueue, Virtqueue] | None = None
        self._interrupt: Interrupt | None = None
        self._egress = egress
        self._limiters = limiters
        self._timers: list[TimerFd] = []
        self._worker = QueueWorker(name, self._decide)
        self._native = ffi.new("struct kvl_net *")
        self._fd = fd
        self._is_stream = framing == "stream"
        try:
            for limiter in limiters:
                if limiter or self._is_stream:
                    self._timers.append(TimerFd())
        except BaseException:
            self.close()
            raise

    @property
    def is_running(self) -> bool:
        """Whether it has queues to serve."""
        return self._worker.is_running

    @property
    def is_idle(self) -> bool:
        """See ``QueueWorker``."""
        return self._worker.is_idle

    def start(
        self,
        rx: Virtqueue,
        tx: Virtqueue,
        interrupt: Interrupt,
        driver_features: int,
        *,
        rx_room: int,
        is_up: bool,
    ) -> None:
        """Serve these queues, both in use.

        Args:
            rx, tx, interrupt, driver_features: What the driver came up with.
            rx_room: Bytes of receive buffers to have ready for a frame.
            is_up: Whether frames pass.
        """
        native = ffi.new("struct kvl_net *")
        native.rx, native.tx = rx.native, tx.native
        native.irq = interrupt.native
        native.worker = self._worker.native
        native.egress = ffi.NULL if self._egress is None else self._egress
        native.rx_limiter, native.tx_limiter = self._limiters
        native.rx_timer, native.tx_timer = (timer.fd for timer in self._timers) if self._timers else (-1, -1)
        native.fd = self._fd
        native.is_stream = self._is_stream
        native.is_mergeable = has(driver_features, VIRTIO_NET_F_MRG_RXBUF)
        native.has_flags = has(driver_features, VIRTIO_NET_F_GUEST_CSUM)
        native.rx_room = rx_room
        lib.kvl_net_set_link(native, is_up)
        if lib.kvl_net_start(native, rx.kick_eventfd, tx.kick_eventfd):
            raise ValueError(f"{self._name}: the worker has no room")
        # Kept for what C points to.
        self._native, self._queues, self._interrupt = native, (rx, tx), interrupt
        self._worker.start()

    def stop(self) -> None:
        """Serve them no more; nothing of theirs is touched when this returns."""
        self._worker.stop()
        lib.kvl_worker_clear(self._worker.native)
        self._queues = self._interrupt = None

    def close(self) -> None:
        """Stop, and give the descriptors of the thread back."""
        self.stop()
        self._worker.close()
        for timer in self._timers:
            timer.close()

    def set_link(self, is_up: bool) -> None:
        """Let frames pass, or drop them. Any thread."""
        lib.kvl_net_set_link(self._native, is_up)

    def count(self, name: str) -> int:
        """A field of ``struct kvl_net_counters``, or ``pauses``, since the driver came up. Any thread."""
        return int(self._native.pauses if name == "pauses" else getattr(self._native.counters, name))

    def _decide(self, code: int, source: int) -> bool:
        """Deal with what C came back for; on the worker's thread. Returns whether it goes on."""
        try:
            if code == lib.KVL_NET_E_GONE:
                self._on_lost(_gone(self._native.error))
            elif code == lib.KVL_NET_E_PEER:
                length = self._native.error & 0xFFFFFFFF
                self._on_lost(f"its peer announced a frame of {length} bytes, which breaks the protocol")
            else:
                self._report_faults(code)
        except Exception as error:  # a bug of ours: the machine ends and says so
            self._on_error(error)
            return False
        return True

    def _report_faults(self, code: int) -> None:
        if self._queues is None:
            raise ValueError(f"{self._name}: code {code} from a worker without queues")
        for queue in self._queues:
            queue.report_native_fault()


def _gone(error: int) -> str:
    import os

    return f"the host's end failed: {os.strerror(error)}" if error else "its peer has closed the connection"


def room_for(mtu: int) -> int:
    """Bytes of receive buffers to have ready for frames of an interface with this MTU."""
    return min(_SMALL_OVERHEAD + mtu, LARGE_ROOM)
