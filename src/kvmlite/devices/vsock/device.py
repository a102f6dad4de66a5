"""virtio-vsock in user space (VIRTIO 1.2, 5.10): stream sockets between the guest and this host.

::

    device.py      config space, queues, threads        connection.py  rules of one stream, no I/O
    mux.py         table of connections, guest to host  endpoint.py    a connection and its host socket
    rx.py          host to guest: the rx queue          host.py        who listens on the host
"""

from __future__ import annotations

import errno
import queue
import socket
from functools import partial
from typing import TYPE_CHECKING

from kvmlite.abi.virtio_vsock import (
    EVENT_QUEUE,
    RX_QUEUE,
    TX_QUEUE,
    VIRTIO_ID_VSOCK,
    VIRTIO_VSOCK_CONFIG,
    VIRTIO_VSOCK_EVENT,
    VIRTIO_VSOCK_EVENT_TRANSPORT_RESET,
)
from kvmlite.devices.vsock.counters import Counters, VsockStatistics
from kvmlite.devices.vsock.host import HostSide, socket_pair
from kvmlite.devices.vsock.mux import ANSWER_TIMEOUT_S, Multiplexer, Request
from kvmlite.errors import HostError, StateError
from kvmlite.virtio.device import read_config_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.devices.vsock.endpoint import Loop
    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import Virtqueue


class VirtioVsock:
    """A socket device with three queues: rx, tx, event. Offers stream sockets, not seqpacket.

    Args:
        guest_cid: The guest's address, 3 <= guest_cid < 2**32 - 1.
        loop: The device loop.
        uds_path: Unix socket for host programs (see :mod:`.unix_listener`), or None.
        name: How messages call the device.

    Raises:
        ConfigError: Somebody else listens at ``uds_path``.
        HostError: The host refuses to listen there.

    Thread: queues and sockets belong to the device loop; ``listen``, ``connect``, ``statistics`` and config reads
    are for any thread.
    """

    device_id = VIRTIO_ID_VSOCK
    queue_sizes = (256, 256, 16)
    device_features = 0
    queues_elsewhere = False

    def __init__(
        self,
        *,
        guest_cid: int,
        loop: Loop,
        uds_path: str | None = None,
        name: str = "virtio-vsock0",
    ) -> None:
        self.name = name
        self._guest_cid = guest_cid
        self._config = VIRTIO_VSOCK_CONFIG.pack(guest_cid)
        self._loop = loop
        self._counters = Counters()
        self._host = HostSide(loop, uds_path)
        self._mux: Multiplexer | None = None
        self._event_queue: Virtqueue | None = None
        self._interrupt: Interrupt | None = None
        self._owes_event = False

    # ---- VirtioDevice ----

    def read_config(self, offset: int, size: int) -> bytes:
        """Return config space: 0 le64 guest_cid; zeros after it. Spec: VIRTIO 1.2, 5.10.4."""
        return read_config_bytes(self._config, offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: no field is writable."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Start with the queues of a driver that is up. Thread: a vCPU's, before any kick."""
        self._interrupt = interrupt
        self._event_queue = queues[EVENT_QUEUE]
        self._mux = Multiplexer(
            self._guest_cid,
            (queues[RX_QUEUE], queues[TX_QUEUE]),
            interrupt,
            self._host,
            self._counters,
        )
        if self._host.unix_listener is not None:
            self._loop.post(partial(self._host.unix_listener.start, self._open_for_client))

    def reset(self) -> None:
        """Drop all connections and touch the queues no more; hosts read end of stream. Thread: a vCPU's."""
        self._loop.call(self._reset)

    def _reset(self) -> None:
        if self._host.unix_listener is not None:
            self._host.unix_listener.stop()
        mux, self._mux = self._mux, None
        self._event_queue = None
        self._owes_event = False
        if mux is not None:
            mux.close()
        self._host.clock.close()

    def hang_up(self) -> None:
        """The guest has ended: hosts get what it had queued, then end of stream; nobody can connect any more.

        A host that is slow to read gets its bytes as long as the device loop runs. Thread: any.
        """
        self._loop.call(self._hang_up)

    def _hang_up(self) -> None:
        if self._host.unix_listener is not None:
            self._host.unix_listener.stop()
        if self._mux is not None:
            self._mux.hang_up()

    def process_queue(self, index: int) -> None:
        """Serve a queue the driver kicked. Thread: the device loop."""
        if self._mux is None:
            return
        if index == TX_QUEUE:
            self._mux.kick_tx()
        elif index == RX_QUEUE:
            self._mux.kick_rx()
        elif self._owes_event:
            self._send_event()

    def close(self) -> None:
        """End all connections and remove the Unix socket. Thread: any; vCPUs and the device loop have stopped."""
        self._reset()
        self._host.close()

    # ---- the host's face ----

    def listen(self, port: int, accept: Callable[[int], None]) -> None:
        """Take the guest's connections to a port of the host (CID 2).

        Args:
            port: Port the guest connects to.
            accept: Called on the device loop with a connected stream socket's fd, which it owns. Must not block.

        Raises:
            ConfigError: The port has a listener.
        """
        self._host.listen(port, accept)

    def connect(self, port: int, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Connect to a port the guest listens at, and wait for its answer.

        Args:
            port: Port of the guest.
            timeout_s: How long to wait, in seconds.

        Returns:
            A connected, blocking stream socket's fd, owned by the caller.

        Raises:
            HostError: ECONNREFUSED if nobody listens there or the guest's driver is not up; ETIMEDOUT.
            StateError: The device loop has stopped.

        Thread: any but the device loop. Blocks.
        """
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # The device gives up later than this call does, in case nobody is left to cancel.
        request = Request(lambda _: answers.put(True), lambda: answers.put(False), timeout_s + 1.0)
        ours, theirs = socket_pair()
        with theirs:
            try:
                self._loop.post(partial(self._open, port, ours, request))
            except StateError:
                ours.close()
                raise
            try:
                accepted = answers.get(timeout=timeout_s)
            except queue.Empty:
                self._loop.post(partial(self._cancel, request))
                raise HostError(
                    f"{self.name}: guest port {port}: no answer within {timeout_s:g} s",
                    errno.ETIMEDOUT,
                    hint="is the guest running?",
                ) from None
            if not accepted:
                raise HostError(
                    f"{self.name}: guest port {port}: connection refused",
                    errno.ECONNREFUSED,
                    hint="nothing listens at that port in the guest, or its vsock driver is not up yet",
                )
            return theirs.detach()

    def _open(self, port: int, host_socket: socket.socket, request: Request) -> None:
        if self._mux is None:
            host_socket.close()
            request.on_refused()
        else:
            self._mux.open_for_host(port, host_socket, request)

    def _cancel(self, request: Request) -> None:
        if self._mux is not None:
            self._mux.cancel(request)

    def _open_for_client(self, port: int, client: socket.socket) -> None:
        """Open a connection for a program at the Unix socket; its answer is a line, or the end."""

        def accept(host_port: int) -> None:
            try:
                client.send(b"OK %d\n" % host_port, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:  # it has left: reading finds out and tells the guest
                pass

        self._open(port, client, Request(accept, lambda: None))

    # ---- for others ----

    def send_transport_reset(self) -> None:
        """Tell the driver that all connections are gone and the CID may have changed (after a restore).

        Thread: any. Spec: VIRTIO 1.2, 5.10.6.7.
        """
        self._loop.call(self._transport_reset)

    def _transport_reset(self) -> None:
        if self._mux is not None:
            self._mux.drop_all()
            self._owes_event = True
            self._send_event()

    def _send_event(self) -> None:
        """Use one event buffer; without one, the driver's next kick brings it."""
        if self._event_queue is None or self._interrupt is None:
            return
        chain = self._event_queue.pop()
        if chain is None:
            return
        event = VIRTIO_VSOCK_EVENT.pack(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET)
        written = chain.write(event) if chain.writable_size >= len(event) else 0
        self._owes_event = written == 0
        self._event_queue.add_used(chain.head_index, written)
        if self._event_queue.needs_interrupt():
            self._interrupt.raise_queue()

    def statistics(self) -> VsockStatistics:
        """Return a snapshot of the counters. Thread: any."""
        mux = self._mux
        counters = {name: getattr(self._counters, name) for name in Counters.__slots__}
        return VsockStatistics(
            connections=0 if mux is None else len(mux),
            unsent_bytes=0 if mux is None else mux.unsent_bytes,
            **counters,
        )
