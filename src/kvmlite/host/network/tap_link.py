"""Links over a TAP that the host's administrator has set up: an existing one, a descriptor, or one of ours in a bridge.

Rules for what a guest may send are kept by whoever carries its frames: these never pass the host's own firewall.
"""

from __future__ import annotations

import secrets

from kvmlite.errors import ConfigError, HostError
from kvmlite.host.network.egress import UDP, EgressRule, native_egress
from kvmlite.host.network.link import GuestAddresses, OpenLink
from kvmlite.host.tap import adopt_tap, make_tap, open_tap
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmlite.host.network.link import Surroundings
    from kvmlite.host.tap import Tap

PREFIX = "kvl"
VLAN_MAX = 4094
TCP = 6
_DNS_PORT = 53


def new_name() -> str:
    """A name for an interface that nobody else has: ``kvl`` and eight digits."""
    return PREFIX + secrets.token_hex(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class TapLink:
    """An existing TAP interface, by name or as an open descriptor.

    Attributes:
        name: Of the interface; empty if ``fd`` is given.
        fd: A descriptor of one, or -1. It stays the caller's.
        guest: What the guest is told.
        rules: All the guest may reach; None for everything.
    """

    serves_card = False

    name: str = ""
    fd: int = -1
    guest: GuestAddresses = GuestAddresses()
    rules: tuple[EgressRule, ...] | None = None

    def open(self, surroundings: Surroundings) -> OpenLink:
        """See ``Link``."""
        if self.fd < 0:
            tap = open_tap(self.name, queue_pairs=surroundings.queue_pairs)
        elif surroundings.queue_pairs > 1:
            raise ConfigError(f"one descriptor of a TAP serves one queue pair, not {surroundings.queue_pairs}")
        else:
            tap = adopt_tap(self.fd)
        return _opened(tap, self.guest, self.rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeLink:
    """A TAP of our own, as a port of a bridge that is there.

    Attributes:
        bridge: Its name.
        vlan: The guest's VLAN, 1 to 4094; 0: the bridge's own default.
        guest: What the guest is told.
        rules: All the guest may reach; None for everything.
    """

    serves_card = False

    bridge: str
    vlan: int = 0
    guest: GuestAddresses = GuestAddresses()
    rules: tuple[EgressRule, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.vlan <= VLAN_MAX:
            raise ConfigError(f"VLAN {self.vlan} is not from 1 to {VLAN_MAX}")

    def open(self, surroundings: Surroundings) -> OpenLink:
        """See ``Link``."""
        from kvmlite.host.network.interfaces import Interfaces

        with Interfaces() as interfaces:
            self._check_bridge(interfaces)
            tap = make_tap(new_name(), queue_pairs=surroundings.queue_pairs)
            try:
                interfaces.join_bridge(tap.name, self.bridge)
                if self.vlan:
                    interfaces.set_vlan(tap.name, self.vlan)
                interfaces.raise_up(tap.name)
            except BaseException:
                tap.close()
                raise
        return _opened(tap, self.guest, self.rules)

    def _check_bridge(self, interfaces: Any) -> None:
        make_it = f"make it: sudo ip link add {self.bridge} up type bridge" + (" vlan_filtering 1" if self.vlan else "")
        try:
            filters_vlans = interfaces.bridge_filters_vlans(self.bridge)
        except HostError as error:
            raise HostError(str(error), error.errno or 0, hint=error.hint or make_it) from error
        if filters_vlans is None:
            raise HostError(f"{self.bridge} is no bridge", hint="name a bridge, or use --net tap=NAME")
        if self.vlan and not filters_vlans:
            raise HostError(
                f"bridge {self.bridge} does not keep VLANs apart",
                hint=f"sudo ip link set {self.bridge} type bridge vlan_filtering 1",
            )


def _opened(tap: Tap, guest: GuestAddresses, rules: tuple[EgressRule, ...] | None) -> OpenLink:
    egress = None if rules is None else native_egress((*rules, *name_rules(guest.nameservers)))
    return OpenLink(tap=tap, guest=guest, egress=egress)


def name_rules(nameservers: tuple[str, ...]) -> tuple[EgressRule, ...]:
    """Rules that let a guest ask its resolvers."""
    return tuple(
        EgressRule(network=server, port=_DNS_PORT, protocol=protocol)
        for server in nameservers
        for protocol in (UDP, TCP)
    )
