"""A queue pair that the host's kernel serves: /dev/vhost-net between the rings and a TAP."""

from __future__ import annotations

import _thread

from kvmlite.abi.vhost import VHOST_FILE_UNBIND
from kvmlite.abi.virtio import VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from kvmlite.abi.virtio_net import VIRTIO_NET_F_MRG_RXBUF
from kvmlite.devices.net.features import bits
from kvmlite.errors import HostError
from kvmlite.host.vhost import VHOST_NET, Vhost
from kvmlite.virtio.vhost import VhostQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import Virtqueue

_RX, _TX = 0, 1
# What the kernel has to know of; all the others are between the driver and the TAP.
_FEATURES = bits(VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC)


def make_vhost_pairs(fds: tuple[int, ...], resources: DeviceResources) -> list[VhostPair]:
    """A pair for each queue of a TAP.

    Raises:
        HostError: The host has no vhost-net that we can use.
    """
    pairs: list[VhostPair] = []
    try:
        for fd in fds:
            pairs.append(VhostPair(fd, resources))
    except BaseException:
        for pair in pairs:
            pair.close()
        raise
    return pairs


class VhostPair:
    """One pair of queues, one thread of the kernel.

    Args:
        fd: The TAP's, opened with a header of 12 bytes; the port's.
        resources: The device's.

    Raises:
        HostError: The host has no vhost-net that we can use.

    Thread: ``set_link`` any; the others one at a time.
    """

    is_idle = True

    def __init__(self, fd: int, resources: DeviceResources) -> None:
        self._fd = fd
        self._memory = resources.memory
        self._lock = _thread.allocate_lock()
        self._is_served = False
        self.is_running = False
        self._queues: list[VhostQueue] = []
        self._vhost = Vhost(VHOST_NET)
        try:
            if self._vhost.features() & _FEATURES != _FEATURES:
                raise HostError(f"{VHOST_NET} is too old: it lacks features of VIRTIO 1.0")
            for index in (_RX, _TX):
                self._queues.append(VhostQueue(self._vhost, index, resources.loop))
        except BaseException:
            self.close()
            raise

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
        """Hand the queues to the kernel. It knows by itself how large the next frame is: ``rx_room`` means nothing.

        Raises:
            HostError: The kernel refuses.
        """
        self._vhost.set_features(driver_features & _FEATURES)
        self._vhost.set_memory((region.gpa, region.size, region.hva) for region in self._memory.regions)
        self.is_running = True
        for ring, queue in zip(self._queues, (rx, tx), strict=True):
            ring.start(self._memory, queue, interrupt)
        self.set_link(is_up)
        rx.kick()
        tx.kick()

    def set_link(self, is_up: bool) -> None:
        """Let frames pass, or not: then the kernel takes none from either side."""
        with self._lock:
            is_served = is_up and self.is_running
            if is_served == self._is_served:
                return
            self._is_served = is_served
            for index in (_RX, _TX):
                self._vhost.set_net_backend(index, self._fd if is_served else VHOST_FILE_UNBIND)

    def stop(self) -> None:
        """Take the queues back; the kernel touches nothing of theirs when this returns."""
        self.is_running = False  # first: a link that comes up from now on brings nothing back
        self.set_link(False)
        for ring in self._queues:
            ring.stop()

    def close(self) -> None:
        """Stop, and give the kernel's thread back."""
        self.stop()
        for ring in self._queues:
            ring.close()
        self._vhost.close()

    def count(self, name: str) -> int:
        """Nobody counts."""
        return 0
