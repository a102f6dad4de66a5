"""Subnets for guests, the host's resolvers, and ``--publish``."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from kvmlite.errors import ConfigError, HostError
from kvmlite.host.network.address import choose_subnet, nameservers, parse_range, routed_networks, system_nameservers
from kvmlite.host.network.publish import Publish, parse_publish, parse_publishes

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
tun0\t0000D50A\t00000000\t0001\t0\t0\t0\tFCFFFFFF\t0\t0\t0
"""


def test_networks_with_a_route_are_known_without_the_default_route(tmp_path: Path) -> None:
    (tmp_path / "route").write_text(ROUTES)
    found = routed_networks(str(tmp_path / "route"))
    assert [str(network) for network in found] == ["192.0.2.0/24", "10.213.0.0/30"]


def test_the_first_free_subnet_is_taken() -> None:
    within = parse_range("10.213.0.0/28")
    taken = [IPv4Network("10.213.0.0/30"), IPv4Network("10.213.0.8/32"), IPv4Network("172.16.0.0/12")]
    assert str(choose_subnet(within, 30, taken)) == "10.213.0.4/30"
    assert str(choose_subnet(within, 30, [])) == "10.213.0.0/30"
    with pytest.raises(HostError, match="no subnet is left") as info:
        choose_subnet(within, 30, [IPv4Network("10.0.0.0/8")])
    assert "range=" in info.value.hint


def test_a_stub_resolver_stands_for_those_behind_it(tmp_path: Path) -> None:
    stub, upstream = tmp_path / "stub", tmp_path / "upstream"
    stub.write_text("search example.org\nnameserver 127.0.0.53\nnameserver ::1\nnameserver nonsense\n")
    assert system_nameservers(str(stub)) == ("127.0.0.53",)
    assert nameservers(str(stub), str(upstream)) == ("127.0.0.53",)
    upstream.write_text("nameserver 192.0.2.53\n nameserver 9.9.9.9\n")
    assert nameservers(str(stub), str(upstream)) == ("192.0.2.53", "9.9.9.9")
    assert nameservers(str(upstream), str(stub)) == ("192.0.2.53", "9.9.9.9")
    assert system_nameservers(str(tmp_path / "absent")) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080:80", Publish(host_port=8080, guest_port=80)),
        ("8080:80/tcp", Publish(host_port=8080, guest_port=80)),
        ("53:5353/udp", Publish(host_port=53, guest_port=5353, protocol="udp")),
        ("0.0.0.0:1:65535", Publish(host_port=1, guest_port=65535, host_address="0.0.0.0")),
    ],
)
def test_publish_reads(text: str, expected: Publish) -> None:
    assert parse_publish(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "80", ":80", "80:", ":80:80", "0:80", "80:65536", "a:80", "8080:80/sctp", "host:8080:80", "1.2.3:8080:80", "::1:80:80",
     "1.2.3.4:5:6:7"],
)  # fmt: skip
def test_publish_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="--publish"):
        parse_publish(text)


def test_a_port_of_the_host_leads_to_one_of_the_guest() -> None:
    different = ["8080:80", "8080:80/udp", "8081:80", "127.0.0.2:8080:81"]
    assert parse_publishes(different) == tuple(map(parse_publish, different))
    for again in ("8080:81", "0.0.0.0:8080:81"):
        with pytest.raises(ConfigError, match="port 8080 of the host leads to port 80 already"):
            parse_publishes(["8080:80", again])
