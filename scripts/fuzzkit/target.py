"""What the fuzzer has to know of a device. ``tests/native/fuzz_NAME.py`` has a class ``Target``, a subclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Protocol

    from kvmlite.testing import DriverQueue
    from kvmlite.virtio.device import DeviceResources, VirtioDevice

    class Kick(Protocol):
        """Notifies the device and lets its loop come to rest."""

        def __call__(self) -> None: ...


@dataclass(slots=True)
class Op:
    """A step of an input: numbers that mean what the target makes of them.

    Attributes:
        queue: One of the device's.
        index: 0 to 255.
        flags: 0 to 255.
        size: 32 bits.
        value: 64 bits.
    """

    queue: int
    index: int
    flags: int
    size: int
    value: int


class DeviceTarget:
    """A device, its messages and its host. Only ``attach`` has to be there."""

    holds: tuple[int, ...] = ()
    """Chains of each queue that the device may keep when it is at rest; none of those not listed."""

    honest_queue = 0
    """The queue that ``honest`` is given."""

    def attach(self, resources: DeviceResources) -> VirtioDevice:
        """Make the device. What it asks its host for must come at once and be the same in each run."""
        raise NotImplementedError

    def message(self, op: Op) -> bytes:
        """A message for ``op.queue`` that is nearly right; chains of all kinds are made without it, too."""
        return op.value.to_bytes(8, "little") + op.size.to_bytes(4, "little")

    def host(self, op: Op) -> None:
        """Do something that the host may do at any time."""

    def end_case(self) -> None:
        """Put away what ``host`` has made; the device has been reset, and the next driver comes."""

    def honest(self, queue: DriverQueue, kick: Kick) -> None:
        """Have the device serve an honest driver, which is up, and assert that it does.

        Only ``honest_queue`` is set up. Called now and then, after a reset.
        """
