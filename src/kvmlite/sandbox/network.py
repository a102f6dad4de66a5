"""A guest's network: the card, what it is plugged into, and its set-up inside the guest."""

from __future__ import annotations

import errno
import os

from kvmlite.devices.net import Net, parse_mac
from kvmlite.devices.net.link import LinkBackend
from kvmlite.errors import ConfigError, UnsupportedError
from kvmlite.guest.agent import GuestError
from kvmlite.guest.network import NetworkSettings, Route
from kvmlite.host.network.link import GuestAddresses

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.guest.agent import AgentClient
    from kvmlite.host.network.egress import EgressRule
    from kvmlite.host.network.link import Link
    from kvmlite.host.network.publish import Publish
    from kvmlite.machine.config import DeviceSpec

NET_HINT = "choose none, user, nat, bridge=NAME, tap=NAME or fd=N"
_COMMON = ("mac", "queues")
_ADDRESSED = ("address", "gateway", "dns")
_WORDS: dict[str, tuple[str, ...]] = {
    "user": ("mac",),
    "nat": (*_COMMON, "range", "dhcp"),
    "bridge": (*_COMMON, *_ADDRESSED, "vlan"),
    "tap": (*_COMMON, *_ADDRESSED),
    "fd": ("mac", *_ADDRESSED),
}


class Network:
    """A network for one guest: a part of ``GuestConfig.parts``.

    Args:
        mode: As ``--net`` takes it: ``user``; ``nat[,range=CIDR][,dhcp]``; ``bridge=NAME[,vlan=N]``, ``tap=NAME`` or
            ``fd=N``, these with ``[,address=CIDR][,gateway=ADDRESS][,dns=ADDRESS]``; ``mac=`` and ``queues=`` with all but
            ``user``, which has one queue.
        publish: Ports of the host that lead to the guest: ``[HOSTADDR:]HOST:GUEST[/udp]``. With ``user`` and ``nat``.
        allow: What the guest may reach, ``CIDR|HOST[:PORT]``; None: everything. Names are looked up now.

    Raises:
        ConfigError: Something is not of its form, or does not go together.
        HostError: A name cannot be looked up.

    Thread: any, one at a time.
    """

    features = ("net", "packet")

    def __init__(self, mode: str, *, publish: Sequence[str] = (), allow: Sequence[str] | None = None) -> None:
        kind, values = _parse_mode(mode)
        self._mac = values.get("mac") or _random_mac()
        mac = parse_mac(self._mac)
        self._backend = LinkBackend(_make_link(kind, values, mac, publish, allow), mac=mac)
        queue_pairs = _parse_number(values.get("queues", "1"), "queues")
        self._card = Net(backend=self._backend, queue_pairs=queue_pairs)
        self.devices: tuple[DeviceSpec, ...] = (self._card,)

    @property
    def needs_shared_memory(self) -> bool:
        """See ``GuestPart``."""
        return self._card.needs_shared_memory

    def set_up(self, agent: AgentClient, windows: Sequence[int]) -> None:
        """Give the interface its addresses and bring it up.

        Raises:
            UnsupportedError: The guest's kernel does not drive the card.
            GuestError: It refused something else.
        """
        settings = settings_for(self._mac, self._backend.guest)
        try:
            agent.configure_network(settings)
        except GuestError as error:
            if error.errno != errno.ENODEV:
                raise
            raise UnsupportedError(
                "the guest's kernel does not drive its network card",
                hint="it needs CONFIG_VIRTIO_NET, built in or as a module beside the kernel",
            ) from error


def settings_for(mac: str, guest: GuestAddresses) -> NetworkSettings:
    """What the agent is told."""
    networks: tuple[str, ...] = ()
    if guest.gateway:
        everything = "::/0" if ":" in guest.gateway else "0.0.0.0/0"
        networks = (everything,) if guest.reachable is None else guest.reachable
    if guest.gateway and guest.reachable is not None:
        networks = (*networks, *(f"{server}/32" for server in guest.nameservers))
    return NetworkSettings(
        mac=mac,
        addresses=(guest.address,) if guest.address else (),
        routes=tuple(_route(network, guest.gateway) for network in dict.fromkeys(networks)),
        resolv_conf="".join(f"nameserver {server}\n" for server in guest.nameservers),
    )


def _route(network: str, gateway: str) -> Route:
    """Through the gateway; the gateway itself is on the link."""
    return Route(destination=network, gateway="" if network == f"{gateway}/32" else gateway)


def _parse_mode(mode: str) -> tuple[str, dict[str, str]]:
    first, *words = mode.split(",")
    kind, has_value, value = first.partition("=")
    takes_value = kind in ("bridge", "tap", "fd")
    if kind not in _WORDS or bool(has_value) != takes_value or (takes_value and not value):
        raise ConfigError(f"--net {mode!r}: {first!r} is no kind of network", hint=NET_HINT)
    values = {kind: value}
    for word in words:
        name, has_value, value = word.partition("=")
        if name not in _WORDS[kind] or bool(has_value) != (name != "dhcp"):
            raise ConfigError(f"--net {mode!r}: {word!r} means nothing", hint=f"{kind} takes {', '.join(_WORDS[kind])}")
        values[name] = value
    return kind, values


def _make_link(
    kind: str, values: dict[str, str], mac: bytes, publish: Sequence[str], allow: Sequence[str] | None
) -> Link:
    from kvmlite.host.network.egress import parse_allow, resolve
    from kvmlite.host.network.publish import parse_publishes

    publishes = parse_publishes(publish)
    if publishes and kind not in ("user", "nat"):
        raise ConfigError(
            f"--publish does not go with --net {kind}: the guest has an address of its own there",
            hint="connect to that address, or use --net user or nat",
        )
    rules = None if allow is None else resolve(parse_allow(text) for text in allow)
    if kind == "user":
        from kvmlite.host.network.passt import UserLink

        return UserLink(mac=mac, publishes=publishes, rules=rules)
    if kind == "nat":
        return _nat_link(values, publishes, rules)
    return _tap_link(kind, values, rules)


def _nat_link(values: dict[str, str], publishes: tuple[Publish, ...], rules: tuple[EgressRule, ...] | None) -> Link:
    from kvmlite.host.network.nat import DEFAULT_RANGE, NatLink

    return NatLink(
        range=values.get("range", DEFAULT_RANGE), publishes=publishes, rules=rules, has_dhcp="dhcp" in values
    )  # fmt: skip


def _tap_link(kind: str, values: dict[str, str], rules: tuple[EgressRule, ...] | None) -> Link:
    from kvmlite.host.network.tap_link import BridgeLink, TapLink

    guest = _addresses(values)
    if kind == "bridge":
        vlan = _parse_number(values["vlan"], "vlan") if "vlan" in values else 0
        return BridgeLink(bridge=values["bridge"], vlan=vlan, guest=guest, rules=rules)
    if kind == "tap":
        return TapLink(name=values["tap"], guest=guest, rules=rules)
    return TapLink(fd=_parse_number(values["fd"], "fd", minimum=0), guest=guest, rules=rules)


def _addresses(values: dict[str, str]) -> GuestAddresses:
    from ipaddress import ip_address, ip_interface

    address, gateway, dns = (values.get(name, "") for name in _ADDRESSED)
    try:
        if address:
            ip_interface(address)
        for other in filter(None, (gateway, dns)):
            ip_address(other)
    except ValueError as error:
        raise ConfigError(f"--net: {error}", hint="write address=10.0.0.5/24,gateway=10.0.0.1,dns=10.0.0.1") from error
    if address and "/" not in address:
        raise ConfigError(f"--net: address {address} has no prefix", hint=f"write address={address}/24")
    if (gateway or dns) and not address:
        raise ConfigError("--net: a gateway or dns without an address", hint="give address=CIDR, or leave all to DHCP")
    return GuestAddresses(address=address, gateway=gateway, nameservers=(dns,) if dns else ())


def _parse_number(text: str, name: str, *, minimum: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and minimum <= int(text) < 1 << 16):
        raise ConfigError(f"--net: {name}={text!r} is no number from {minimum} on")
    return int(text)


def _random_mac() -> str:
    """Locally administered, of one card."""
    return ":".join(f"{byte:02x}" for byte in (0x52, 0x54, *os.urandom(4)))
