"""virtio-net: a network card. The spec is here; the device loads when a machine has one.

What is on the other side of the card is a ``NetBackend``: it opens a ``NetPort`` when the device is made.
"""

from __future__ import annotations

from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kvmlite.devices.net.device import VirtioNet
    from kvmlite.devices.vhost_user import VhostUserDevice
    from kvmlite.virtio.device import DeviceResources

    class NetPort(Protocol):
        """An open way in and out for frames. The device owns it and closes it."""

        @property
        def fds(self) -> tuple[int, ...]:
            """Nonblocking descriptors, one per queue pair; the port's."""

        @property
        def framing(self) -> str:
            """What a frame looks like on a descriptor.

            ``tap``: one read or write each, behind a ``virtio_net_hdr_v1`` of 12 bytes. ``stream``: behind its length in
            32 big-endian bits, without a header, on a stream socket.
            """

        @property
        def offloads(self) -> int:
            """``TUN_F_*`` that ``set_offloads`` may ask for; 0 for a stream.

            A stream whose peer makes the checksums of its frames itself, right there, has the attribute ``has_valid_sums``,
            which is true: the driver is told not to check them.
            """

        @property
        def mac(self) -> bytes | None:
            """Address the guest's interface shall have, if the other side has a say in it."""

        @property
        def mtu(self) -> int | None:
            """Largest packet the other side takes, in bytes, if that is not 1500."""

        @property
        def egress(self) -> Any:
            """``struct kvl_egress *`` with the rules for what the guest sends, kept alive by the port; None: anything."""

        def set_offloads(self, flags: int) -> None:
            """Say which ``TUN_F_*`` the driver takes.

            Raises:
                OSError: The other side is gone.
            """

        def set_queue_pairs(self, count: int) -> None:
            """Say how many of the descriptors are served, from the first on.

            Raises:
                OSError: The other side is gone.
            """

        def close(self) -> None:
            """Close the descriptors, and give back what is behind them."""

    class NetBackend(Protocol):
        """What a network card is plugged into."""

        def open(self, resources: DeviceResources, queue_pairs: int) -> NetPort:
            """Open it for the device of that name, with so many descriptors.

            Raises:
                ConfigError: It cannot have as many, or is not possible at all.
                HostError: The host refuses.
            """

    class ElsewhereBackend(NetBackend, Protocol):
        """A backend with a program that can serve the card's queues itself."""

        @property
        def needs_shared_memory(self) -> bool:
            """Whether it does, on this host; a ``NetBackend`` without this attribute never does."""

        def make_device(self, resources: DeviceResources, *, mac: bytes | None, mtu: int | None) -> VhostUserDevice:
            """Make the device, instead of ``open``.

            Raises:
                ConfigError: It is not possible.
                HostError: The host refuses.
            """


MAX_QUEUE_PAIRS = 8
_MTU_MIN, _MTU_MAX = 68, 65535  # IPv4's minimum; what the field holds
_MAX_BURST_S = 3600.0
VHOST_CHOICES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network card.

    Attributes:
        backend: What it is plugged into.
        mac: Its address, as ``52:54:00:12:34:56``; None: the backend's, or a random one.
        mtu: Largest packet, in bytes, that the guest shall send; None: the backend's, or the guest's own choice.
        queue_pairs: How many vCPUs can send and receive at the same time.
        vhost: Whether the host's kernel carries the frames (``/dev/vhost-net``): ``on``, ``off``, or ``auto`` where
            that is possible. With ``auto`` a program that is the backend may also serve the card itself (vhost-user), unless
            there are limits.
        bandwidth: Bytes a second it carries each way; 0 is unlimited.
        packets: Frames a second it carries each way; 0 is unlimited.
        burst_s: How many seconds' worth of both it may carry at once after a rest.
    """

    backend: NetBackend
    mac: str | None = None
    mtu: int | None = None
    queue_pairs: int = 1
    vhost: str = "auto"
    bandwidth: int = 0
    packets: int = 0
    burst_s: float = 1.0

    def __post_init__(self) -> None:
        if self.mac is not None:
            parse_mac(self.mac)
        if self.mtu is not None and not _MTU_MIN <= self.mtu <= _MTU_MAX:
            raise ConfigError(f"net: mtu {self.mtu} is not in {_MTU_MIN}..{_MTU_MAX}")
        if not 1 <= self.queue_pairs <= MAX_QUEUE_PAIRS:
            raise ConfigError(f"net: {self.queue_pairs} queue pairs, allowed are 1 to {MAX_QUEUE_PAIRS}")
        if self.vhost not in VHOST_CHOICES:
            raise ConfigError(f"net: vhost {self.vhost!r} is none of {', '.join(VHOST_CHOICES)}")
        if self.bandwidth < 0 or self.packets < 0 or not 0 < self.burst_s <= _MAX_BURST_S:
            raise ConfigError(
                f"net: limits of {self.bandwidth} bytes/s and {self.packets} frames/s with bursts of {self.burst_s} s",
                hint=f"limits are positive, or 0 for none; a burst is above 0, up to {_MAX_BURST_S} s",
            )

    @property
    def needs_shared_memory(self) -> bool:
        """Whether another process serves the card, and has to map guest RAM."""
        is_free = self.vhost == "auto" and not self.bandwidth and not self.packets and self.queue_pairs == 1
        return is_free and bool(getattr(self.backend, "needs_shared_memory", False))

    def attach(self, resources: DeviceResources) -> VirtioNet | VhostUserDevice:
        """Open the backend and make the device.

        Raises:
            ConfigError: The backend cannot do what the spec asks for.
            HostError: The host refuses.
        """
        from kvmlite.devices.net.device import VirtioNet
        from kvmlite.devices.net.limits import Limits

        mac = None if self.mac is None else parse_mac(self.mac)
        if self.needs_shared_memory:
            elsewhere: Any = self.backend  # an ElsewhereBackend
            device: VhostUserDevice = elsewhere.make_device(resources, mac=mac, mtu=self.mtu)
            return device
        port = self.backend.open(resources, self.queue_pairs)
        try:
            return VirtioNet(
                port,
                mac=mac,
                mtu=self.mtu,
                vhost=self.vhost,
                limits=Limits(bandwidth=self.bandwidth, packets=self.packets, burst_s=self.burst_s),
                resources=resources,
            )
        except BaseException:
            port.close()
            raise


def parse_mac(text: str) -> bytes:
    """Read a MAC address, six bytes in hexadecimal with colons.

    Raises:
        ConfigError: It is none, or one of a group.
    """
    hint = "six bytes, the first one even: 52:54:00:12:34:56"
    parts = text.split(":")
    digits = "0123456789abcdefABCDEF"
    if len(parts) != 6 or any(len(part) != 2 or part[0] not in digits or part[1] not in digits for part in parts):
        raise ConfigError(f"net: {text!r} is no MAC address", hint=hint)
    mac = bytes(int(part, 16) for part in parts)
    if mac[0] & 1 or mac == bytes(6):
        raise ConfigError(f"net: {text!r} is not the address of one card", hint=hint)
    return mac
