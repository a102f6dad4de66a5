"""Plays the guest's driver on the registers of the MMIO transport, in the order Linux does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlite.abi.virtio import VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, DeviceStatus
from kvmlite.abi.virtio_mmio import MmioRegister

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.testing.driver_queue import DriverQueue
    from kvmlite.virtio.mmio import MmioTransport


class MmioDriver:
    """A driver that knows the registers and nothing of the device behind them."""

    def __init__(self, transport: MmioTransport) -> None:
        self.transport = transport

    def load(self, register: int) -> int:
        """Read a register."""
        return self.transport.read(register, 4)

    def store(self, register: int, value: int) -> None:
        """Write a register."""
        self.transport.write(register, 4, value)

    @property
    def status(self) -> DeviceStatus:
        """Device status."""
        return DeviceStatus(self.load(MmioRegister.STATUS))

    def add_status(self, bit: int) -> None:
        """Set one status bit more."""
        self.store(MmioRegister.STATUS, self.load(MmioRegister.STATUS) | bit)

    def reset(self) -> None:
        """Write 0 and see it answered."""
        self.store(MmioRegister.STATUS, 0)
        assert self.status == 0, f"status reads {self.status!r} after a reset"

    def read_features(self) -> int:
        """All 64 device feature bits."""
        features = 0
        for selector in (1, 0):
            self.store(MmioRegister.DEVICE_FEATURES_SEL, selector)
            features = features << 32 | self.load(MmioRegister.DEVICE_FEATURES)
        return features

    def write_features(self, features: int) -> None:
        """All 64 driver feature bits."""
        for selector in (1, 0):
            self.store(MmioRegister.DRIVER_FEATURES_SEL, selector)
            self.store(MmioRegister.DRIVER_FEATURES, features >> 32 * selector & 0xFFFFFFFF)

    def negotiate(self, features: int | None = None) -> bool:
        """Go as far as FEATURES_OK; None takes all that is offered. Returns whether the device agreed."""
        self.reset()
        self.add_status(DeviceStatus.ACKNOWLEDGE)
        self.add_status(DeviceStatus.DRIVER)
        self.write_features(self.read_features() if features is None else features)
        self.add_status(DeviceStatus.FEATURES_OK)
        return DeviceStatus.FEATURES_OK in self.status

    def set_up_queue(self, index: int, queue: DriverQueue) -> None:
        """Tell the device where a queue is."""
        self.store(MmioRegister.QUEUE_SEL, index)
        assert not self.load(MmioRegister.QUEUE_READY), f"queue {index} is ready before its set-up"
        assert queue.size <= self.load(MmioRegister.QUEUE_NUM_MAX), f"queue {index} is smaller than {queue.size}"
        self.store(MmioRegister.QUEUE_NUM, queue.size)
        for low, gpa in (
            (MmioRegister.QUEUE_DESC_LOW, queue.desc_gpa),
            (MmioRegister.QUEUE_AVAIL_LOW, queue.avail_gpa),
            (MmioRegister.QUEUE_USED_LOW, queue.used_gpa),
        ):
            self.store(low, gpa & 0xFFFFFFFF)
            self.store(low + 4, gpa >> 32)
        self.store(MmioRegister.QUEUE_READY, 1)
        assert self.load(MmioRegister.QUEUE_READY) == 1, f"queue {index} did not become ready"

    def start(self, queues: Sequence[DriverQueue], features: int | None = None) -> None:
        """Bring the device up: reset, features, queues, DRIVER_OK."""
        offered = self.transport.state.device_features
        wanted = offered if features is None else features | 1 << VIRTIO_F_VERSION_1
        if not all(queue.event_idx for queue in queues):
            wanted &= ~(1 << VIRTIO_RING_F_EVENT_IDX)
        assert self.negotiate(wanted), f"features {wanted:#x} refused, offered are {offered:#x}"
        for index, queue in enumerate(queues):
            self.set_up_queue(index, queue)
        self.add_status(DeviceStatus.DRIVER_OK)

    def notify(self, index: int) -> None:
        """Kick a queue through its register."""
        self.store(MmioRegister.QUEUE_NOTIFY, index)

    def take_interrupt(self) -> int:
        """Read the interrupt status and acknowledge it."""
        bits = self.load(MmioRegister.INTERRUPT_STATUS)
        if bits:
            self.store(MmioRegister.INTERRUPT_ACK, bits)
        return bits

    def read_config(self, offset: int, size: int) -> bytes:
        """Configuration space, byte by byte, until its generation stands still."""
        while True:
            before = self.load(MmioRegister.CONFIG_GENERATION)
            start = MmioRegister.CONFIG + offset
            data = bytes(self.transport.read(start + position, 1) for position in range(size))
            if self.load(MmioRegister.CONFIG_GENERATION) == before:
                return data
