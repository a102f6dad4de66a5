"""Fuzzes the control queue of virtio-net; its other queues are served in C and have a fuzz target of their own."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from fuzzkit.target import DeviceTarget

from kvmlite.abi.tun import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO4, TUN_F_USO6
from kvmlite.abi.virtio_net import VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_OK
from kvmlite.devices.net.device import VirtioNet
from kvmlite.testing import Used

if TYPE_CHECKING:
    from fuzzkit.target import Kick, Op

    from kvmlite.testing import DriverQueue
    from kvmlite.virtio.device import DeviceResources

PAIRS = 2
COMMANDS = (
    (VIRTIO_NET_CTRL_MQ, 0), (VIRTIO_NET_CTRL_MQ, 0), (VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0), (VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0),
    (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (VIRTIO_NET_CTRL_MQ, 1), (VIRTIO_NET_CTRL_MQ, 2), (0xFF, 0xFF),
)  # fmt: skip


class Port:
    """A way out that takes everything, or has gone."""

    fds = tuple(range(-PAIRS, 0))
    framing = "tap"
    offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6
    mac = bytes((2, 0, 0, 0, 0, 1))
    mtu = None
    egress = None
    is_gone = False

    def set_offloads(self, flags: int) -> None:
        if self.is_gone:
            raise OSError(errno.EBADFD, "gone")
        assert not flags & ~self.offloads

    def set_queue_pairs(self, count: int) -> None:
        if self.is_gone:
            raise OSError(errno.EBADFD, "gone")
        assert 1 <= count <= PAIRS

    def close(self) -> None:
        """Nothing to close."""


class IdlePair:
    """A pair that carries nothing; it minds the order of its calls."""

    is_idle = True
    is_running = False

    def start(self, rx: Any, tx: Any, interrupt: Any, driver_features: int, *, rx_room: int, is_up: bool) -> None:
        assert not self.is_running
        assert not rx.is_stopped
        assert not tx.is_stopped
        assert rx_room > 0
        self.is_running = True

    def stop(self) -> None:
        self.is_running = False

    def set_link(self, is_up: bool) -> None:
        """No frames to stop."""


class ControlledNet(VirtioNet):
    """A card whose frames go nowhere."""

    def _make_worker_pairs(self, resources: DeviceResources) -> None:
        pairs: Any = [IdlePair() for _ in range(PAIRS)]
        self._pairs += pairs


class Target(DeviceTarget):
    """A card with two queue pairs and a control queue."""

    honest_queue = 2 * PAIRS

    def attach(self, resources: DeviceResources) -> VirtioNet:
        self._port = Port()
        port: Any = self._port
        self.device = ControlledNet(port, vhost="off", resources=resources)
        return self.device

    def message(self, op: Op) -> bytes:
        kind, command = COMMANDS[op.index % len(COMMANDS)]
        if op.value >> 32 & 15 == 15:
            kind, command = op.value & 0xFF, op.value >> 8 & 0xFF
        if kind == VIRTIO_NET_CTRL_MQ:
            data = (op.value & 0xFFFF if op.value >> 36 & 15 == 15 else op.value & 3).to_bytes(2, "little")
        elif kind == VIRTIO_NET_CTRL_GUEST_OFFLOADS:
            wanted = self.device._driver_features if op.value >> 36 & 3 == 0 else op.value
            data = (wanted & (1 << 64) - 1).to_bytes(8, "little")
        else:  # address tables claim any number of entries
            data = op.value.to_bytes(8, "little") * (op.size >> 8 & 31)
        return (bytes((kind, command)) + data)[: op.value >> 44 & 15 if op.value >> 40 & 15 == 15 else None]

    def host(self, op: Op) -> None:
        if op.index % 4 == 0:
            self._port.is_gone = bool(op.value & 1)
        else:
            self.device.set_link(bool(op.value & 1))

    def end_case(self) -> None:
        self._port.is_gone = self.device._is_lost = False
        self.device.set_link(True)

    def honest(self, queue: DriverQueue, kick: Kick) -> None:
        head = queue.add_chain(readable=[bytes((VIRTIO_NET_CTRL_MQ, 0)), bytes((PAIRS, 0))], writable=[1])
        kick()
        used = queue.take_used()
        assert used == Used(head, 1)
        assert used.data == bytes((VIRTIO_NET_OK,))
