"""Fuzzes virtio-rng."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuzzkit.target import DeviceTarget

from kvmlite.devices.rng import REQUEST_LIMIT, VirtioRng
from kvmlite.testing import Used

if TYPE_CHECKING:
    from fuzzkit.target import Kick

    from kvmlite.testing import DriverQueue
    from kvmlite.virtio.device import DeviceResources

BYTES = bytes(range(1, 256)) * (REQUEST_LIMIT // 255 + 1)


class Target(DeviceTarget):
    """Random bytes that are always the same."""

    def attach(self, resources: DeviceResources) -> VirtioRng:
        return VirtioRng(resources.name, lambda size: BYTES[:size])

    def honest(self, queue: DriverQueue, kick: Kick) -> None:
        head = queue.add_chain(writable=[1, 70])
        kick()
        assert queue.take_used() == Used(head, 71)
