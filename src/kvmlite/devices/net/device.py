"""The network card: features, configuration and control here, frames in C, a thread for each queue pair."""

from __future__ import annotations

import os

from kvmlite.abi.virtio import VIRTIO_ID_NET
from kvmlite.abi.virtio_net import (
    VIRTIO_NET_CONFIG,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_S_LINK_UP,
)
from kvmlite.devices.net import features
from kvmlite.devices.net.control import ControlQueue
from kvmlite.devices.net.limits import Limits
from kvmlite.devices.net.pair import LARGE_ROOM, WorkerPair, room_for
from kvmlite.errors import ConfigError, HostError
from kvmlite.host.link_watch import LinkWatch
from kvmlite.records import dataclass
from kvmlite.virtio.device import read_config_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from kvmlite.devices.net import NetPort
    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import Virtqueue

    class Pair(Protocol):
        """Who serves two queues: ``WorkerPair``, ``VhostPair``."""

        @property
        def is_running(self) -> bool: ...
        @property
        def is_idle(self) -> bool: ...
        def start(
            self,
            rx: Virtqueue,
            tx: Virtqueue,
            interrupt: Interrupt,
            driver_features: int,
            *,
            rx_room: int,
            is_up: bool,
        ) -> None: ...
        def stop(self) -> None: ...
        def close(self) -> None: ...
        def set_link(self, is_up: bool) -> None: ...
        def count(self, name: str) -> int: ...


QUEUE_SIZE = 256
CONTROL_QUEUE_SIZE = 64
DEFAULT_MTU = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class NetStatistics:
    """Frames since the driver came up; all zeros where the host's kernel carries them (vhost).

    Attributes:
        rx_packets, rx_bytes: Given to the guest.
        tx_packets, tx_bytes: Sent by it.
        rx_dropped, tx_dropped: Not delivered: link down, malformed, or larger than what the other side takes.
        tx_refused: Not allowed by the egress rules.
        pauses: Times a direction had to wait because of its limits.
    """

    rx_packets: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    tx_dropped: int = 0
    tx_refused: int = 0
    pauses: int = 0


_COUNTS = ("rx_packets", "rx_bytes", "rx_dropped", "tx_packets", "tx_bytes", "tx_dropped", "tx_refused", "pauses")


class VirtioNet:
    """A network card (VIRTIO 1.2, 5.1).

    Args:
        port: What it is plugged into; the device's once it is made.
        mac: Its address; None: the port's, or a random one.
        mtu: What to tell the driver; None: the port's, or nothing.
        vhost: As in ``Net``.
        limits: What it may carry; None: anything.
        resources: What it may have of the machine.

    Attributes:
        has_vhost: Whether the host's kernel carries the frames.

    Thread: queue pairs on a worker's each, the control queue on the device loop, ``set_link`` and ``statistics``
    any, the rest a vCPU's.
    """

    device_id = VIRTIO_ID_NET
    queues_elsewhere = True

    def __init__(
        self,
        port: NetPort,
        *,
        mac: bytes | None = None,
        mtu: int | None = None,
        vhost: str = "auto",
        limits: Limits | None = None,
        resources: DeviceResources,
    ) -> None:
        self.name = resources.name
        self.mac = mac or port.mac or random_mac()
        self.mtu = mtu or port.mtu
        count = len(port.fds)
        self.queue_sizes = (QUEUE_SIZE, QUEUE_SIZE) * count + (CONTROL_QUEUE_SIZE,)
        self.device_features = features.offered(
            port.offloads,
            queue_pairs=count,
            has_mtu=self.mtu is not None,
            has_valid_sums=getattr(port, "has_valid_sums", False),
        )
        self._port = port
        self._warn = resources.warn
        self._loop = resources.loop
        self._is_up = True
        self._is_lost = False
        self._interrupt: Interrupt | None = None
        self._queues: tuple[Virtqueue, ...] = ()
        self._control_fd = -1
        self._driver_features = 0
        self._rx_room = 0
        self._limits = limits or Limits()
        self._limiters = self._limits.make(), self._limits.make()
        self._link_watch: LinkWatch | None = None
        self._pairs: list[Pair] = []
        try:
            if vhost != "off":
                self._make_vhost_pairs(resources, is_needed=vhost == "on")
            self.has_vhost = bool(self._pairs)
            if not self.has_vhost:
                self._make_worker_pairs(resources)
        except BaseException:
            self._close_pairs()
            raise

    def _make_worker_pairs(self, resources: DeviceResources) -> None:
        port = self._port
        for index, fd in enumerate(port.fds):
            name = f"{self.name}-{index}"
            on_error = resources.on_error
            self._pairs.append(
                WorkerPair(
                    name, fd, port.framing, port.egress, self._limiters, on_lost=self._on_lost, on_error=on_error
                )
            )

    def _make_vhost_pairs(self, resources: DeviceResources, *, is_needed: bool) -> None:
        """Pairs served by the kernel, where it can: it takes a TAP alone, and knows neither egress rules nor limits."""
        if self._port.framing != "tap" or self._port.egress is not None or self._limits:
            if is_needed:
                raise ConfigError(f"{self.name}: vhost carries the frames of a TAP without limits or rules for them")
            return
        from kvmlite.devices.net.vhost import make_vhost_pairs

        try:
            self._pairs += make_vhost_pairs(self._port.fds, resources)
        except HostError:
            if is_needed:
                raise
            return
        self._link_watch = LinkWatch(self._port.fds[0], resources.loop, self._on_gone)

    def _on_gone(self) -> None:
        self._on_lost("the interface was removed")

    def _close_pairs(self) -> None:
        if self._link_watch is not None:
            self._link_watch.close()
            self._link_watch = None
        for pair in self._pairs:
            pair.close()

    @property
    def is_idle(self) -> bool:
        """Whether all frames announced before the call were carried. Any thread."""
        return all(pair.is_idle for pair in self._pairs)

    # ---- VirtioDevice ----

    def read_config(self, offset: int, size: int) -> bytes:
        """Return configuration space. Spec: VIRTIO 1.2, 5.1.4."""
        status = VIRTIO_NET_S_LINK_UP if self._is_up else 0
        config = VIRTIO_NET_CONFIG.pack(self.mac, status, len(self._pairs), self.mtu or DEFAULT_MTU)
        return read_config_bytes(config, offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: no field is writable for a driver of VIRTIO 1.x."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Start with one pair; the driver asks for the others on the control queue."""
        self._queues, self._interrupt, self._driver_features = queues, interrupt, driver_features
        self._set_offloads(features.tap_offloads(driver_features))
        self._serve(1)
        if features.has(driver_features, VIRTIO_NET_F_CTRL_VQ):
            # Behind the pairs that can be used (5.1.2).
            is_multi = features.has(driver_features, VIRTIO_NET_F_MQ)
            control = queues[2 * len(self._pairs) if is_multi else 2]
            if not control.is_stopped:
                self._control_fd = control.kick_eventfd
                self._loop.add_reader(self._control_fd, ControlQueue(control, interrupt, self).on_kick)
                control.kick()

    def reset(self) -> None:
        """Forget the driver; no queue is touched when this returns."""
        if self._control_fd >= 0:
            self._loop.remove_reader(self._control_fd)
            self._control_fd = -1
        for pair in self._pairs:
            pair.stop()
        self._queues, self._interrupt = (), None

    def close(self) -> None:
        """End the threads, then close the port."""
        self._close_pairs()
        self._port.close()

    # ---- Card: what the control queue asks for; on the device loop ----

    def set_queue_pairs(self, count: int) -> bool:
        """Serve so many pairs; whether there are as many."""
        if not 1 <= count <= len(self._pairs) or not features.has(self._driver_features, VIRTIO_NET_F_MQ):
            return False
        self._serve(count)
        return True

    def set_guest_offloads(self, wanted: int) -> bool:
        """Switch offloads of received frames; whether all of them were negotiated."""
        if wanted & ~features.guest_offload_mask(self._driver_features):
            return False
        return self._set_offloads(features.tap_offloads(wanted))

    def _serve(self, count: int) -> None:
        if self._interrupt is None:
            return
        try:
            self._port.set_queue_pairs(count)
        except OSError as error:
            self._on_lost(f"cannot use {count} queues of it: {os.strerror(error.errno or 0)}")
        for index, pair in enumerate(self._pairs):
            if index >= count:
                pair.stop()
            elif not pair.is_running:
                self._start(pair, self._queues[2 * index], self._queues[2 * index + 1], self._interrupt)

    def _start(self, pair: Pair, rx: Virtqueue, tx: Virtqueue, interrupt: Interrupt) -> None:
        if rx.is_stopped or tx.is_stopped:
            return  # the driver set up neither, or only one of them
        try:
            pair.start(rx, tx, interrupt, self._driver_features, rx_room=self._rx_room, is_up=self._is_up)
            pair.set_link(self._is_up)  # it may have changed meanwhile
        except HostError as error:
            self._on_lost(str(error))

    def _set_offloads(self, flags: int) -> bool:
        is_large = features.may_receive_large(features.tap_offloads(self._driver_features))
        self._rx_room = LARGE_ROOM if is_large else room_for(self.mtu or DEFAULT_MTU)
        try:
            self._port.set_offloads(flags)
        except OSError as error:
            self._on_lost(f"cannot set its offloads: {os.strerror(error.errno or 0)}")
            return False
        return True

    # ---- the host's face ----

    @property
    def is_link_up(self) -> bool:
        """What the driver sees as its carrier."""
        return self._is_up

    def set_link(self, is_up: bool) -> None:
        """Plug the cable in, or pull it: frames of both directions are dropped then. Any thread.

        A link whose host's end has failed stays down.
        """
        is_up = is_up and not self._is_lost
        if is_up == self._is_up:
            return

        def update() -> None:
            self._is_up = is_up

        interrupt = self._interrupt
        if interrupt is None:
            update()
        else:
            interrupt.raise_config(update)
        for pair in self._pairs:
            pair.set_link(is_up)

    def _on_lost(self, reason: str) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        self._warn(f"{self.name}: the link is down: {reason}")
        self.set_link(False)

    def statistics(self) -> NetStatistics:
        """Return a snapshot; any thread."""
        return NetStatistics(**{name: sum(pair.count(name) for pair in self._pairs) for name in _COUNTS})


def random_mac() -> bytes:
    """A locally administered address of one card."""
    mac = bytearray(os.urandom(6))
    mac[0] = mac[0] & 0xFC | 0x02
    return bytes(mac)
