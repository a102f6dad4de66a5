"""Guest memory and a driver's queue in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.recorder_device import Recorder

from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing import DriverQueue, VirtioRig


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    guest_memory = GuestMemory(2 << 20)
    yield guest_memory
    guest_memory.close()


@pytest.fixture
def driver(memory: GuestMemory) -> DriverQueue:
    return DriverQueue(memory, size=8)


@pytest.fixture
def rig() -> Iterator[VirtioRig]:
    with VirtioRig(lambda resources: Recorder(resources.name)) as made:
        yield made


@pytest.fixture
def recorder(rig: VirtioRig) -> Recorder:
    assert isinstance(rig.device, Recorder)
    return rig.device
