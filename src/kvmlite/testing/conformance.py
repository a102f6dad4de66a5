"""Rules every virtio device has to keep, whatever it does: run them on yours in one line.

They are VIRTIO's "device MUST" and "driver MUST NOT" sentences, the latter as attacks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvmlite.abi.virtio import (
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
    VRING_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    DeviceStatus,
)
from kvmlite.abi.virtio_mmio import VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_MAGIC, MmioRegister
from kvmlite.testing.rig import VirtioRig

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.testing.driver_queue import DriverQueue
    from kvmlite.virtio.device import DeviceResources, VirtioDevice

    Factory = Callable[[DeviceResources], VirtioDevice]
    Attack = Callable[[DriverQueue], None]

MAX_VISIT_S = 1.0  # generous: shared build machines; a walk that does not end takes for ever


def check_virtio_device(factory: Factory) -> None:
    """Run all checks on fresh devices.

    Args:
        factory: Makes a device from what a machine hands out, as ``spec.attach`` does.

    Raises:
        AssertionError: A rule is broken; the message says which.
    """
    for check in CHECKS:
        with VirtioRig(factory) as rig:
            check(rig)
            assert not rig.errors, f"{check.__name__}: {rig.errors[0]!r}"
    for name, attack in ATTACKS.items():
        with VirtioRig(factory) as rig:
            for index in range(len(rig.queues)):
                _check_attack(rig, name, attack, index)


def check_identity(rig: VirtioRig) -> None:
    """Registers tell what the device is before any driver comes (4.2.2.1)."""
    assert rig.driver.load(MmioRegister.MAGIC_VALUE) == VIRTIO_MMIO_MAGIC
    assert rig.driver.load(MmioRegister.VERSION) == 2
    assert rig.driver.load(MmioRegister.DEVICE_ID) == rig.device.device_id != 0
    for index, size in enumerate(rig.device.queue_sizes):
        assert size & (size - 1) == 0, f"queue {index} has size {size}, not a power of two"
        rig.driver.store(MmioRegister.QUEUE_SEL, index)
        assert rig.driver.load(MmioRegister.QUEUE_NUM_MAX) == size
    rig.driver.store(MmioRegister.QUEUE_SEL, len(rig.queues))
    assert rig.driver.load(MmioRegister.QUEUE_NUM_MAX) == 0, "a queue that does not exist has a size"


def check_features(rig: VirtioRig) -> None:
    """FEATURES_OK only for what was offered, with VERSION_1 (2.2, 3.1.1, 6.1)."""
    offered = rig.driver.read_features()
    assert offered >> VIRTIO_F_VERSION_1 & 1, "VERSION_1 is not offered"
    assert not offered >> VIRTIO_F_RING_PACKED & 1, "packed rings are offered"
    assert not rig.driver.negotiate(offered & ~(1 << VIRTIO_F_VERSION_1)), "accepted a driver without VERSION_1"
    for bit in range(64):
        if not offered >> bit & 1:
            assert not rig.driver.negotiate(1 << VIRTIO_F_VERSION_1 | 1 << bit), f"accepted feature {bit}, not offered"
    assert rig.driver.negotiate(offered), "refused what it offers"
    assert rig.driver.negotiate(1 << VIRTIO_F_VERSION_1), "refused a driver that wants no more than VERSION_1"


def check_idle_until_driver_ok(rig: VirtioRig) -> None:
    """No buffer is touched and no interrupt raised before DRIVER_OK (3.1.1)."""
    assert rig.driver.negotiate()
    for index, queue in enumerate(rig.queues):
        queue.add_chain(writable=[64])
        rig.driver.set_up_queue(index, queue)
        rig.driver.notify(index)
    rig.loop.run()
    assert [queue.used_idx for queue in rig.queues] == [0] * len(rig.queues), "used a buffer before DRIVER_OK"
    assert rig.take_irq() == 0, "signalled the irqfd before DRIVER_OK"
    assert rig.driver.take_interrupt() == 0, "set an interrupt bit before DRIVER_OK"


def check_spurious_kicks(rig: VirtioRig) -> None:
    """Notifications without buffers, or for queues that do not exist, change nothing (2.7.13)."""
    rig.start()
    for value in (*range(len(rig.queues)), len(rig.queues), 0xFFFF, 0xFFFFFFFF):
        rig.kick(value)
    assert rig.driver.status == _UP
    rig.driver.reset()
    for index in range(len(rig.queues)):
        rig.kick(index)
    assert rig.driver.status == 0


def check_reset(rig: VirtioRig) -> None:
    """A reset forgets the driver, touches no queue afterwards, and a new driver finds all as new (2.4)."""
    for _ in range(3):
        rig.restart()
        assert rig.driver.status == _UP
        rig.driver.reset()
        before = [rig.memory.read(queue.used_gpa, 6 + 8 * queue.size) for queue in rig.queues]
        for index, queue in enumerate(rig.queues):
            queue.add_chain(writable=[64])
            rig.driver.notify(index)
            rig.driver.store(MmioRegister.QUEUE_SEL, index)
            assert rig.driver.load(MmioRegister.QUEUE_READY) == 0, f"queue {index} is ready after a reset"
        rig.loop.run()
        after = [rig.memory.read(queue.used_gpa, 6 + 8 * queue.size) for queue in rig.queues]
        assert after == before, "wrote to a used ring after a reset"
        assert rig.driver.take_interrupt() == 0, "an interrupt waits after a reset"


def check_queue_setup_frozen(rig: VirtioRig) -> None:
    """Queue registers mean nothing once the driver is up (CVE-2026-5747)."""
    rig.start()
    for index in range(len(rig.queues)):
        rig.driver.store(MmioRegister.QUEUE_SEL, index)
        for register in _QUEUE_REGISTERS:
            for value in (0, 3, 0xFFFFFFFF):
                rig.driver.store(register, value)
        assert rig.driver.load(MmioRegister.QUEUE_READY) == 1, f"queue {index} was taken away from a running device"
        rig.kick(index)
    assert rig.driver.status == _UP


def check_config_access(rig: VirtioRig) -> None:
    """Configuration space takes any offset and width, and reads alike in all of them."""
    whole = rig.driver.read_config(0, 64)
    for size in (1, 2, 4, 8):
        for offset in range(64 - size):
            value = rig.transport.read(MmioRegister.CONFIG + offset, size)
            assert value == int.from_bytes(whole[offset : offset + size], "little"), f"config at {offset}, {size} bytes"
    for offset in range(0xF00 - 0x100, 0xF00, 7):
        assert rig.transport.read(MmioRegister.CONFIG + offset, 8) >= 0


def check_queue_left_alone(rig: VirtioRig) -> None:
    """A driver that sets up none of the queues is served, idly (2.1)."""
    assert rig.driver.negotiate()
    rig.driver.add_status(DeviceStatus.DRIVER_OK)
    for index in range(len(rig.queues)):
        rig.kick(index)
    assert rig.driver.status == _UP


_UP = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK

_QUEUE_REGISTERS = (
    MmioRegister.QUEUE_NUM,
    MmioRegister.QUEUE_READY,
    MmioRegister.QUEUE_DESC_LOW,
    MmioRegister.QUEUE_DESC_HIGH,
    MmioRegister.QUEUE_AVAIL_LOW,
    MmioRegister.QUEUE_AVAIL_HIGH,
    MmioRegister.QUEUE_USED_LOW,
    MmioRegister.QUEUE_USED_HIGH,
)

CHECKS = (
    check_identity,
    check_features,
    check_idle_until_driver_ok,
    check_spurious_kicks,
    check_reset,
    check_queue_setup_frozen,
    check_config_access,
    check_queue_left_alone,
)


def _self_loop(queue: DriverQueue) -> None:
    queue.set_descriptor(0, queue.allocate(bytes(16)), 16, VRING_DESC_F_NEXT, 0)
    queue.publish(0)


def _two_cycle(queue: DriverQueue) -> None:
    gpa = queue.allocate(bytes(16))
    queue.set_descriptor(0, gpa, 16, VRING_DESC_F_NEXT, 1)
    queue.set_descriptor(1, gpa, 16, VRING_DESC_F_NEXT, 0)
    queue.publish(0)


def _indirect(entries: int, size: int, flags: int = 0) -> Attack:
    def attack(queue: DriverQueue) -> None:
        table = queue.allocate(bytes(16 * entries))
        queue.set_descriptor(0, table, size, VRING_DESC_F_INDIRECT | flags, 1)
        queue.publish(0)

    return attack


def _nested_indirect(queue: DriverQueue) -> None:
    inner = VRING_DESC.pack(queue.desc_gpa, 16, VRING_DESC_F_INDIRECT, 0)
    queue.set_descriptor(0, queue.allocate(inner), 16, VRING_DESC_F_INDIRECT)
    queue.publish(0)


def _buffer(gpa: int, size: int, flags: int) -> Attack:
    def attack(queue: DriverQueue) -> None:
        queue.set_descriptor(0, gpa, size, flags)
        queue.publish(0)

    return attack


def _readable_after_writable(queue: DriverQueue) -> None:
    gpa = queue.allocate(bytes(32))
    queue.set_descriptor(0, gpa, 16, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1)
    queue.set_descriptor(1, gpa + 16, 16)
    queue.publish(0)


def _next_outside(queue: DriverQueue) -> None:
    queue.set_descriptor(0, queue.allocate(bytes(16)), 16, VRING_DESC_F_NEXT, queue.size)
    queue.publish(0)


def _too_large(queue: DriverQueue) -> None:
    for index in range(queue.size):
        flags = VRING_DESC_F_WRITE | (VRING_DESC_F_NEXT if index < queue.size - 1 else 0)
        queue.set_descriptor(index, 0, 0xFFFFFFFF, flags, index + 1)
    queue.publish(0)


ATTACKS: dict[str, Attack] = {
    "chain that loops onto itself": _self_loop,
    "chain of two that loops": _two_cycle,
    "indirect table of 0 bytes": _indirect(1, 0),
    "indirect table of 15 bytes": _indirect(1, 15),
    "indirect table of 4 GiB": _indirect(1, 0xFFFFFFF0),
    "indirect with a next descriptor": _indirect(1, 16, VRING_DESC_F_NEXT),
    "indirect table inside another": _nested_indirect,
    "readable buffer outside RAM": _buffer(0xD0000000, 16, 0),
    "writable buffer outside RAM": _buffer(0xD0000000, 16, VRING_DESC_F_WRITE),
    "buffer across the end of RAM": _buffer((8 << 20) - 8, 16, VRING_DESC_F_WRITE),
    "buffer that wraps at 2**64": _buffer(2**64 - 8, 16, VRING_DESC_F_WRITE),
    "readable after writable": _readable_after_writable,
    "next descriptor outside the table": _next_outside,
    "chain of more than 4 GiB": _too_large,
    "head outside the queue": lambda queue: queue.publish(queue.size),
    "available index one too far": lambda queue: queue.set_avail_idx(queue.size + 1),
    "available index gone back": lambda queue: queue.set_avail_idx(0xFFFF),
}


def _check_attack(rig: VirtioRig, name: str, attack: Attack, index: int) -> None:
    """The device asks for a reset, or never looked at this queue; a reset then mends it (2.1.2)."""
    where = f"{name}, queue {index}"
    rig.restart()
    attack(rig.queues[index])
    started = time.monotonic()
    rig.kick(index)
    assert time.monotonic() - started < MAX_VISIT_S, f"{where}: the visit took too long"
    assert not rig.errors, f"{where}: {rig.errors[0]!r}"
    if rig.driver.status & DeviceStatus.NEEDS_RESET:
        assert rig.driver.take_interrupt() & VIRTIO_MMIO_INT_CONFIG, f"{where}: no config interrupt"
        faults = rig.transport.statistics().faults
        rig.kick(index)
        assert rig.transport.statistics().faults == faults, f"{where}: the broken queue was looked at again"
    rig.restart()
    assert rig.driver.status == _UP, f"{where}: a reset does not mend it"
