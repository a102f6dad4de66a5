"""What ``--allow`` stands for, and what the filter in C makes of a guest's frames."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from kvmlite._native import ffi, lib
from kvmlite.errors import ConfigError, HostError
from kvmlite.host.network.egress import (
    MAX_REPLY_PORTS,
    MAX_RULES,
    Allow,
    EgressRule,
    native_egress,
    parse_allow,
    resolve,
)

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10


@pytest.mark.parametrize(
    ("text", "target", "port"),
    [
        ("10.0.0.0/8", "10.0.0.0/8", 0),
        ("10.0.0.1:443", "10.0.0.1", 443),
        ("10.0.0.0/8:443", "10.0.0.0/8", 443),
        ("example.org", "example.org", 0),
        ("example.org:443", "example.org", 443),
        ("localhost:8080", "localhost", 8080),
        ("2001:db8::/32", "2001:db8::/32", 0),
        ("[2001:db8::1]:22", "2001:db8::1", 22),
        ("[2001:db8::/32]", "2001:db8::/32", 0),
    ],
)
def test_allow_reads(text: str, target: str, port: int) -> None:
    assert parse_allow(text) == Allow(target=target, port=port)


@pytest.mark.parametrize(
    "text",
    ["", ":80", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:http", "10.0.0.0/33", "10.0.0", "1.2.3.4.5",
     "exa mple", "[::1", "[::1]80", "[::1]:", "a..b", "10.0.0.1/8/8", "::1::2"],
)  # fmt: skip
def test_allow_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="--allow"):
        parse_allow(text)


def test_a_name_stands_for_its_addresses() -> None:
    rules = resolve([parse_allow("localhost:80"), parse_allow("127.0.0.1:80"), parse_allow("10.1.2.3/8")])
    assert EgressRule(network="127.0.0.1/32", port=80) in rules
    assert rules[-1] == EgressRule(network="10.0.0.0/8")
    assert len(set(rules)) == len(rules)


def test_a_name_nobody_knows_is_an_error_of_the_host() -> None:
    with pytest.raises(HostError, match=r"no-such-host\.invalid"):
        resolve([parse_allow("no-such-host.invalid")])


def test_too_many_rules_are_refused() -> None:
    rules = [EgressRule(network=f"10.0.{n >> 8}.{n & 255}/32") for n in range(MAX_RULES + 1)]
    with pytest.raises(ConfigError, match="257"):
        native_egress(rules)
    with pytest.raises(ConfigError, match="257"):
        resolve([Allow(target=rule.network) for rule in rules])
    with pytest.raises(ConfigError, match="65"):
        native_egress([], range(1, MAX_REPLY_PORTS + 2))
    assert native_egress(rules[:-1]).rule_count == MAX_RULES


def ethernet(kind: int, payload: bytes) -> bytes:
    return bytes(12) + struct.pack(">H", kind) + payload


def transport(protocol: int, port: int, source: int = 40000, flags: int = SYN) -> bytes:
    if protocol == TCP:
        return struct.pack(">HHIIBBHHH", source, port, 0, 0, 0x50, flags, 0, 0, 0)
    if protocol == UDP:
        return struct.pack(">HHHH", source, port, 8, 0)
    return struct.pack(">BBHHH", port & 0xFF, 0, 0, 0, 0)


def ipv4(to: str, protocol: int, data: bytes, *, first: int = 0x45, fragment: int = 0) -> bytes:
    header = struct.pack(">BBHHHBBH4s4s", first, 0, 20 + len(data), 0, fragment, 64, protocol, 0,
                         bytes([10, 0, 2, 15]), ipaddress.ip_address(to).packed)  # fmt: skip
    return ethernet(0x0800, header + data)


def ipv6(to: str, protocol: int, data: bytes) -> bytes:
    header = struct.pack(
        ">IHBB16s16s", 0x60000000, len(data), protocol, 255, bytes(16), ipaddress.ip_address(to).packed
    )
    return ethernet(0x86DD, header + data)


def frame(to: str, protocol: int = TCP, port: int = 443, **options: int) -> bytes:
    build = ipv6 if ":" in to else ipv4
    return build(to, protocol, transport(protocol, port, **options))


RULES = (
    EgressRule(network="10.1.0.0/20"),
    EgressRule(network="192.0.2.1/32", port=443),
    EgressRule(network="192.0.2.53/32", port=53, protocol=UDP),
    EgressRule(network="2001:db8::/33", port=443),
    EgressRule(network="2001:db9::/32"),
)


def allows(data: bytes, rules: tuple[EgressRule, ...] = RULES, replies: tuple[int, ...] = (), header=None) -> bool:
    egress = native_egress(rules, replies)
    return bool(lib.kvl_egress_allows(egress, header or ffi.NULL, data, len(data)))


@pytest.mark.parametrize(
    "data",
    [
        frame("10.1.15.255", TCP, 1),
        frame("10.1.0.0", UDP, 65535),
        frame("10.1.0.9", ICMP, 8),
        frame("192.0.2.1", TCP, 443),
        frame("192.0.2.1", UDP, 443),
        frame("192.0.2.53", UDP, 53),
        frame("2001:db8:7fff::1", TCP, 443),
        frame("2001:db9::1", ICMPV6, 128),
        ethernet(0x0806, bytes(28)),
        frame("ff02::1:ff00:1", ICMPV6, 135),
        frame("fe80::1", ICMPV6, 136),
        frame("ff02::2", ICMPV6, 133),
        frame("255.255.255.255", UDP, 67, source=68),
        frame("ff02::1:2", UDP, 547, source=546),
    ],
)
def test_what_is_listed_and_what_a_link_needs_passes(data: bytes) -> None:
    assert allows(data)


@pytest.mark.parametrize(
    "data",
    [
        frame("10.1.16.0"),
        frame("10.0.255.255"),
        frame("192.0.2.1", TCP, 80),
        frame("192.0.2.1", ICMP, 8),
        frame("192.0.2.53", TCP, 53),
        frame("2001:db8:8000::1", TCP, 443),
        frame("2001:db8::1", TCP, 80),
        frame("fe80::1", ICMPV6, 128),
        frame("2001:db8::1", ICMPV6, 135),
        frame("fe80::1", ICMPV6, 137),
        frame("255.255.255.255", UDP, 67),
        frame("10.0.2.2", UDP, 67, source=68),
        frame("ff02::1:3", UDP, 547, source=546),
    ],
)
def test_what_is_not_listed_is_refused(data: bytes) -> None:
    assert not allows(data)


TO_ALLOWED = transport(TCP, 443)
HOSTILE = {
    "fragment": ipv4("10.1.0.1", TCP, TO_ALLOWED, fragment=1),
    "first fragment": ipv4("10.1.0.1", TCP, TO_ALLOWED, fragment=0x2000),
    "options": ipv4("10.1.0.1", TCP, bytes(4) + TO_ALLOWED, first=0x46),
    "short header": ipv4("10.1.0.1", TCP, TO_ALLOWED, first=0x44),
    "version 6 in an IPv4 frame": ipv4("10.1.0.1", TCP, TO_ALLOWED, first=0x65),
    "ICMPv6 in IPv4": ipv4("10.1.0.1", ICMPV6, TO_ALLOWED),
    "IP in IP": ipv4("10.1.0.1", 4, TO_ALLOWED),
    "GRE": ipv4("10.1.0.1", 47, TO_ALLOWED),
    "hop-by-hop options": ipv6("2001:db9::1", 0, bytes([TCP, 0, 0, 0, 0, 0, 0, 0]) + TO_ALLOWED),
    "routing header": ipv6("2001:db9::1", 43, bytes(8) + TO_ALLOWED),
    "fragment header": ipv6("2001:db9::1", 44, bytes(8) + TO_ALLOWED),
    "ICMPv4 in IPv6": ipv6("2001:db9::1", ICMP, TO_ALLOWED),
    "VLAN": ethernet(0x8100, b"\0\5" + ipv4("10.1.0.1", TCP, TO_ALLOWED)[12:]),
    "QinQ": ethernet(0x88A8, b"\0\5" + ipv4("10.1.0.1", TCP, TO_ALLOWED)[12:]),
    "802.3": ethernet(46, bytes(46)),
    "PPPoE": ethernet(0x8864, bytes(46)),
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_understood_is_refused(data: bytes) -> None:
    assert not allows(data)


@pytest.mark.parametrize("to", ["10.1.0.1", "2001:db9::1"])
def test_every_shorter_frame_is_refused(to: str) -> None:
    whole = frame(to)
    assert allows(whole)
    assert not any(allows(whole[:size]) for size in range(len(whole)))


def test_a_served_port_answers_anybody_and_opens_nothing() -> None:
    for flags in (SYN_ACK, ACK, 0x04):
        assert allows(frame("203.0.113.9", TCP, 5000, source=80, flags=flags), replies=(22, 80))
    assert not allows(frame("203.0.113.9", TCP, 5000, source=80, flags=SYN), replies=(22, 80))
    assert not allows(frame("203.0.113.9", TCP, 5000, source=80, flags=SYN | 0x01), replies=(22, 80))
    assert not allows(frame("203.0.113.9", TCP, 5000, source=81, flags=ACK), replies=(22, 80))
    assert not allows(frame("203.0.113.9", UDP, 5000, source=80), replies=(22, 80))


def test_a_source_that_is_given_is_the_only_one() -> None:
    for source, expected in (("", True), ("10.0.2.15", True), ("10.0.2.16", False)):
        egress = native_egress(RULES, source=source)
        data = frame("10.1.0.1")  # from 10.0.2.15
        assert bool(lib.kvl_egress_allows(egress, ffi.NULL, data, len(data))) is expected
        data = frame("2001:db9::1")
        assert lib.kvl_egress_allows(egress, ffi.NULL, data, len(data))
    egress = native_egress((), source="10.0.2.16")
    for target, port, expected in (("255.255.255.255", 67, True), ("255.255.255.255", 68, False)):
        data = frame(target, UDP, port, source=68)
        data = data[:26] + bytes(4) + data[30:]
        assert bool(lib.kvl_egress_allows(egress, ffi.NULL, data, len(data))) is expected


def test_no_rules_allow_nothing_and_a_rule_for_all_everything() -> None:
    assert not allows(frame("10.1.0.1"), rules=())
    assert allows(frame("203.0.113.9"), rules=(EgressRule(network="0.0.0.0/0"),))
    assert not allows(frame("2001:db8::1"), rules=(EgressRule(network="0.0.0.0/0"),))
    assert allows(frame("2001:db8::1"), rules=(EgressRule(network="::/0"),))


@pytest.mark.parametrize(
    ("to", "protocol", "fields", "expected"),
    [
        ("10.1.0.1", TCP, {"flags": 1, "csum_start": 34, "csum_offset": 16}, True),
        ("10.1.0.1", UDP, {"flags": 1, "csum_start": 34, "csum_offset": 6}, True),
        ("2001:db9::1", TCP, {"flags": 1, "csum_start": 54, "csum_offset": 16}, True),
        ("10.1.0.1", TCP, {"flags": 1, "csum_start": 14, "csum_offset": 16}, False),  # the destination address
        ("10.1.0.1", TCP, {"flags": 1, "csum_start": 34, "csum_offset": 2}, False),  # the destination port
        ("10.1.0.1", UDP, {"flags": 1, "csum_start": 34, "csum_offset": 16}, False),
        ("10.1.0.1", ICMP, {"flags": 1, "csum_start": 34, "csum_offset": 2}, False),
        ("10.1.0.1", TCP, {"gso_type": 1, "gso_size": 1400}, True),
        ("10.1.0.1", TCP, {"gso_type": 0x81, "gso_size": 1400}, True),
        ("2001:db9::1", TCP, {"gso_type": 4, "gso_size": 1400}, True),
        ("10.1.0.1", TCP, {"gso_type": 4, "gso_size": 1400}, False),
        ("10.1.0.1", UDP, {"gso_type": 5, "gso_size": 1400}, True),
        ("10.1.0.1", TCP, {"gso_type": 5, "gso_size": 1400}, False),
        ("10.1.0.1", UDP, {"gso_type": 3, "gso_size": 1400}, False),
        ("10.1.0.1", TCP, {"gso_type": 0x7F}, False),
    ],
)
def test_what_the_host_is_asked_to_write_is_a_checksum(to: str, protocol: int, fields: dict, expected: bool) -> None:
    assert allows(frame(to, protocol), header=ffi.new("struct virtio_net_hdr *", fields)) is expected
