"""``Network``: what the words of ``--net`` mean, and what the guest is told."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmlite.errors import ConfigError, StateError, UnsupportedError
from kvmlite.guest.agent import GuestError
from kvmlite.guest.network import NetworkSettings, Route
from kvmlite.host.network.egress import EgressRule
from kvmlite.host.network.link import GuestAddresses
from kvmlite.host.network.nat import NatLink
from kvmlite.host.network.passt import UserLink
from kvmlite.host.network.publish import Publish
from kvmlite.host.network.tap_link import BridgeLink, TapLink
from kvmlite.sandbox.network import Network, settings_for
from kvmlite.sandbox.run import run

MAC = "52:54:00:12:34:56"
RULE = EgressRule(network="10.0.0.0/8", port=80)


def link_of(mode: str, **options: Any) -> Any:
    """The link that a network's card is plugged into."""
    return Network(mode, **options)._backend._link


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        (f"user,mac={MAC}", {}, UserLink(mac=bytes.fromhex("525400123456"))),
        (
            f"user,mac={MAC}",
            {"publish": ["8080:80"], "allow": ["10.0.0.0/8:80"]},
            UserLink(
                mac=bytes.fromhex("525400123456"), publishes=(Publish(host_port=8080, guest_port=80),), rules=(RULE,)
            ),
        ),
        ("nat", {}, NatLink()),
        ("nat,range=192.168.0.0/24,dhcp", {"allow": []}, NatLink(range="192.168.0.0/24", has_dhcp=True, rules=())),
        ("bridge=br0", {}, BridgeLink(bridge="br0")),
        (
            "bridge=br0,vlan=7,address=10.0.0.5/24,gateway=10.0.0.1,dns=9.9.9.9",
            {},
            BridgeLink(
                bridge="br0",
                vlan=7,
                guest=GuestAddresses(address="10.0.0.5/24", gateway="10.0.0.1", nameservers=("9.9.9.9",)),
            ),
        ),
        ("tap=tap0,queues=2", {"allow": ["10.0.0.0/8:80"]}, TapLink(name="tap0", rules=(RULE,))),
        ("fd=3", {}, TapLink(fd=3)),
    ],
)
def test_each_mode_is_a_link(mode: str, options: dict, expected: object) -> None:
    assert link_of(mode, **options) == expected


@pytest.mark.parametrize(
    "mode",
    ["", "none", "User", "user=1", "nat=x", "bridge", "bridge=", "tap", "fd", "fd=x", "fd=-1", "user,queues=2",
     "user,address=10.0.0.1/24", "nat,vlan=3", "nat,dhcp=1", "nat,range", "nat,range=10.0.0.0/31", "nat,range=x",
     "bridge=br0,vlan=0", "bridge=br0,vlan=4095", "bridge=br0,vlan=x", "tap=t,vlan=1", "tap=t,address=10.0.0.1",
     "tap=t,address=10.0.0.300/24", "tap=t,gateway=10.0.0.1", "tap=t,address=10.0.0.1/24,dns=x", "user,mac=x",
     "user,mac=01:00:5e:00:00:01", "nat,mac=ff:ff:ff:ff:ff:ff", "user,mac=00:00:00:00:00:00",
     "nat,queues=9", "nat,queues=0", "user,"],
)  # fmt: skip
def test_what_is_no_network_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError):
        Network(mode)


@pytest.mark.parametrize("mode", ["bridge=br0", "tap=tap0", "fd=3"])
def test_ports_are_published_by_those_who_translate_addresses(mode: str) -> None:
    with pytest.raises(ConfigError, match="--publish does not go with"):
        Network(mode, publish=["8080:80"])


def test_publish_and_allow_need_a_network() -> None:
    for options in ({"publish": ["8080:80"]}, {"allow": ["10.0.0.0/8"]}):
        with pytest.raises(ConfigError, match="need a network"):
            run("true", **options)
        with pytest.raises(ConfigError, match="belong to the Network"):
            run("true", network=Network("user"), **options)


def test_each_network_has_an_address_of_its_own() -> None:
    first, second = Network("nat"), Network("nat")
    assert first._mac != second._mac
    assert first._mac.startswith("52:54:")


def test_a_guest_cannot_be_set_up_before_its_card_is_made() -> None:
    with pytest.raises(StateError):
        Network("user").set_up(None, [])  # type: ignore[arg-type]


class DrivenBy:
    """An agent whose kernel answers with an error."""

    def __init__(self, error: int) -> None:
        self._error = error

    def configure_network(self, settings: NetworkSettings) -> None:
        raise GuestError(f"configuring {settings.mac}", self._error)


def test_a_kernel_without_a_driver_is_told_from_other_errors() -> None:
    network = Network("user")
    network._backend._guest = GuestAddresses()
    with pytest.raises(UnsupportedError, match="does not drive") as info:
        network.set_up(DrivenBy(errno.ENODEV), [])  # type: ignore[arg-type]
    assert "CONFIG_VIRTIO_NET" in info.value.hint
    with pytest.raises(GuestError):
        network.set_up(DrivenBy(errno.EPERM), [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("guest", "addresses", "routes", "resolv_conf"),
    [
        (GuestAddresses(), (), (), ""),
        (
            GuestAddresses(address="10.0.2.15/24", gateway="10.0.2.2", nameservers=("10.0.2.3",)),
            ("10.0.2.15/24",),
            (Route(destination="0.0.0.0/0", gateway="10.0.2.2"),),
            "nameserver 10.0.2.3\n",
        ),
        (
            GuestAddresses(address="fd00::2/64", gateway="fd00::1"),
            ("fd00::2/64",),
            (Route(destination="::/0", gateway="fd00::1"),),
            "",
        ),
        (
            GuestAddresses(
                address="10.0.2.15/24",
                gateway="10.0.2.2",
                nameservers=("9.9.9.9",),
                reachable=("10.0.2.2/32", "192.0.2.0/24"),
            ),
            ("10.0.2.15/24",),
            (
                Route(destination="10.0.2.2/32"),
                Route(destination="192.0.2.0/24", gateway="10.0.2.2"),
                Route(destination="9.9.9.9/32", gateway="10.0.2.2"),
            ),
            "nameserver 9.9.9.9\n",
        ),
    ],
)
def test_the_guest_gets_addresses_routes_and_resolvers(
    guest: GuestAddresses, addresses: tuple, routes: tuple, resolv_conf: str
) -> None:
    assert settings_for(MAC, guest) == NetworkSettings(
        mac=MAC, addresses=addresses, routes=routes, resolv_conf=resolv_conf
    )
