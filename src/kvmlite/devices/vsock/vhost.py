"""virtio-vsock served by the host's kernel (vhost): host programs use AF_VSOCK sockets, no byte passes through here."""

from __future__ import annotations

import _thread
import errno
import random
import time
from typing import TYPE_CHECKING

from kvmlite.abi.virtio_vsock import (
    RX_QUEUE,
    TX_QUEUE,
    VIRTIO_ID_VSOCK,
    VIRTIO_VSOCK_CONFIG,
    VIRTIO_VSOCK_F_SEQPACKET,
)
from kvmlite.errors import HostError, StateError
from kvmlite.host.vhost import VHOST_VSOCK, Vhost
from kvmlite.host.vsock import VsockListener, connect
from kvmlite.virtio.device import read_config_bytes
from kvmlite.virtio.vhost import VhostQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import Virtqueue

SERVED_QUEUES = (RX_QUEUE, TX_QUEUE)  # nobody has events to tell: only a machine that was moved would
DRAIN_TIMEOUT_S = 0.5
"""How long the end of the guest waits for the kernel to take what it had queued."""

DRAIN_ROUNDS = 64
"""Times the device loop sees to its readers after that: a socket holds 256 KiB, the agent's reader takes 64 KiB and more."""

_FREE_CIDS = range(1 << 16, 1 << 31)
_ATTEMPTS = 100


class VhostVsock:
    """A socket device whose queues the host's kernel serves.

    Args:
        resources: What the machine hands out.
        cid: The guest's address on this host; None takes a free one.

    Attributes:
        cid: The guest's address.

    Raises:
        HostError: The host has no vhost-vsock or does not let us use it; EADDRINUSE if another guest has the address.

    Thread: any for ``listen`` and ``connect``; the queues belong to the kernel.
    """

    device_id = VIRTIO_ID_VSOCK
    queue_sizes = (256, 256, 16)
    queues_elsewhere = True

    def __init__(self, resources: DeviceResources, cid: int | None) -> None:
        self.name = resources.name
        self._memory = resources.memory
        self._loop = resources.loop
        self._lock = _thread.allocate_lock()  # vCPUs come and go, the end of the machine may come from any thread
        self._queues: tuple[Virtqueue, ...] = ()
        self._listeners: list[VsockListener] = []
        self._rings: list[VhostQueue] = []
        self._vhost = Vhost(VHOST_VSOCK)
        try:
            self.cid = self._take_cid(cid)
            self._vhost_features = self._vhost.features()
            for index in SERVED_QUEUES:
                self._rings.append(VhostQueue(self._vhost, index, resources.loop))
        except BaseException:
            self.close()
            raise
        self.device_features = self._vhost_features & 1 << VIRTIO_VSOCK_F_SEQPACKET

    def _take_cid(self, wanted: int | None) -> int:
        for _ in range(_ATTEMPTS):
            cid = random.choice(_FREE_CIDS) if wanted is None else wanted
            try:
                self._vhost.set_guest_cid(cid)
            except HostError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if wanted is not None:
                    break
            else:
                return cid
        raise HostError(
            f"{self.name}: another guest of this host has the vsock address {wanted if wanted is not None else cid}",
            errno.EADDRINUSE,
            hint="leave cid out: a free one is taken then",
        )

    # ---- VirtioDevice ----

    def read_config(self, offset: int, size: int) -> bytes:
        """Return config space: 0 le64 guest_cid. Spec: VIRTIO 1.2, 5.10.4."""
        return read_config_bytes(VIRTIO_VSOCK_CONFIG.pack(self.cid), offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: no field is writable."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Hand the driver's queues to the kernel."""
        if any(queues[index].layout is None for index in SERVED_QUEUES):
            return  # a driver that wants no sockets
        with self._lock:
            self._vhost.set_features(driver_features & self._vhost_features)
            self._vhost.set_memory((region.gpa, region.size, region.hva) for region in self._memory.regions)
            for index, ring in zip(SERVED_QUEUES, self._rings, strict=True):
                ring.start(self._memory, queues[index], interrupt)
            self._vhost.set_vsock_running(True)
            self._queues = queues
        for index in SERVED_QUEUES:
            queues[index].kick()  # for what was there before

    def reset(self) -> None:
        """Take the queues back; connections end when the driver comes up again, or with the machine."""
        with self._lock:
            self._stop()
        self._unwatch()

    def _stop(self) -> None:
        if self._queues:
            self._queues = ()
            self._vhost.set_vsock_running(False)
            for ring in self._rings:
                ring.release()

    def _unwatch(self) -> None:
        """Not with the lock held: this waits for the loop, which may wait for the lock."""
        for ring in self._rings:
            ring.unwatch()

    def hang_up(self) -> None:
        """The guest has ended: what it had sent is delivered, then its connections end. Thread: any.

        Readers on the device loop get all of it. What others have not read by then is lost: the kernel throws it away.
        """
        for listener in self._listeners:
            listener.close()
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while self._has_unsent() and time.monotonic() < deadline:
            time.sleep(0.001)
        with self._lock:
            self._stop()
        self._unwatch()
        self._close_after(DRAIN_ROUNDS)

    def _close_after(self, rounds: int) -> None:
        """Closing ends the connections, unread bytes included: let the loop go around that often before."""
        if rounds == 0:
            with self._lock:
                self._vhost.close()
            return
        try:
            self._loop.post(lambda: self._close_after(rounds - 1))
        except StateError:  # it has stopped: the machine will close this device soon
            return

    def _has_unsent(self) -> bool:
        with self._lock:
            layout = self._queues[TX_QUEUE].layout if self._queues else None
            if layout is None:
                return False
            return self._memory.read(layout.avail_gpa + 2, 2) != self._memory.read(layout.used_gpa + 2, 2)

    def close(self) -> None:
        """Give the address back; connections end."""
        for listener in self._listeners:
            listener.close()
        self._vhost.close()
        for ring in self._rings:
            ring.close()

    # ---- the host's face ----

    def listen(self, port: int, accept: Callable[[int], None]) -> None:
        """Take this guest's connections to a port of the host (CID 2), as ``VirtioVsock.listen`` does.

        The port is the host's: two machines cannot listen at the same one.

        Raises:
            HostError: EADDRINUSE: somebody does.
        """
        self.serve(VsockListener(port), accept)

    def serve(self, listener: VsockListener, accept: Callable[[int], None]) -> None:
        """The same with a listener that was made before; taken over."""
        self._listeners.append(listener)
        listener.serve(self._loop, self.cid, accept)

    def connect(self, port: int, timeout_s: float = 5.0) -> int:
        """Connect to a port the guest listens at; a blocking socket's fd, owned by the caller.

        Raises:
            HostError: Nobody listens there, or the guest's driver is not up.

        Thread: any but the device loop. Blocks.
        """
        return connect(self.cid, port, timeout_s)
