"""Fakes and conformance suites for devices: the guest's side of a virtqueue, a loop that runs when told to.

Nothing in the product imports this package.
"""

from __future__ import annotations

from kvmlite.testing.conformance import check_virtio_device
from kvmlite.testing.driver_queue import DriverQueue, Used
from kvmlite.testing.interrupt import FakeInterrupt
from kvmlite.testing.loop import ManualLoop
from kvmlite.testing.mmio_driver import MmioDriver
from kvmlite.testing.rig import VirtioRig

__all__ = [
    "DriverQueue",
    "FakeInterrupt",
    "ManualLoop",
    "MmioDriver",
    "Used",
    "VirtioRig",
    "check_virtio_device",
]
