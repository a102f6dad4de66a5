"""virtio-rng: the host's random bytes for the guest (VIRTIO 1.2, 5.4)."""

from __future__ import annotations

import os

from kvmlite.abi.virtio import VIRTIO_ID_RNG
from kvmlite.records import dataclass
from kvmlite.virtio.device import read_config_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import Virtqueue

REQUEST_LIMIT = 65536
"""Bytes one chain gets at most: a guest may offer 4 GiB, and waits for what it uses anyway. Linux asks for 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rng:
    """An entropy device."""

    def attach(self, resources: DeviceResources) -> VirtioRng:
        """Make the device."""
        return VirtioRng(resources.name)


class VirtioRng:
    """Fills what the driver offers, up to ``REQUEST_LIMIT`` bytes for each chain.

    Args:
        name: How messages call it.
        source: Gives that many random bytes; must not block for long.

    Thread: queue on the device loop, the rest a vCPU's.
    """

    device_id = VIRTIO_ID_RNG
    queue_sizes = (64,)
    device_features = 0
    queues_elsewhere = False

    def __init__(self, name: str = "virtio-rng", source: Callable[[int], bytes] = os.urandom) -> None:
        self.name = name
        self._source = source
        self._queue: Virtqueue | None = None
        self._interrupt: Interrupt | None = None

    def read_config(self, offset: int, size: int) -> bytes:
        """Return zeros: there is no configuration space."""
        return read_config_bytes(b"", offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: no field is writable."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Start with the driver's queue."""
        self._queue, self._interrupt = queues[0], interrupt

    def reset(self) -> None:
        """Forget the driver."""
        self._queue = self._interrupt = None

    def process_queue(self, index: int) -> None:
        """Fill every chain that waits."""
        queue, interrupt = self._queue, self._interrupt
        if queue is None or interrupt is None:
            return
        while (chain := queue.pop()) is not None:
            size = min(chain.writable_size, REQUEST_LIMIT)
            queue.add_used(chain.head_index, chain.write(self._source(size)))
        if queue.needs_interrupt():
            interrupt.raise_queue()

    def close(self) -> None:
        """Hold nothing of the host."""
