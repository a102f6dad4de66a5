"""Tables of nftables for guests behind NAT: one table of family ``ip`` per guest, named as its TAP.

Nothing in the tables of others is changed. What a guest sends is judged by the destination it wrote, before anybody
rewrote it; refused connections are answered at once (TCP reset, ICMP administratively prohibited).
"""

from __future__ import annotations

import os
import subprocess

from kvmlite.errors import HostError
from kvmlite.host.daemon import find_program
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO

    from kvmlite.host.network.egress import EgressRule
    from kvmlite.host.network.publish import Publish

_TIMEOUT_S = 20.0
_DNS_PORT = 53
_DHCP = "udp sport 68 udp dport 67"


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """What the host does for a guest behind NAT.

    Attributes:
        tap: Name of the interface, and of the table.
        guest, gateway: The two addresses of the link.
        resolver: Where questions to the gateway's port 53 go; empty for nowhere.
        publishes: Ports of the host that lead to the guest.
        rules: All the guest may reach; None for everything.
        has_dhcp: The host answers DHCP on the link.
    """

    tap: str
    guest: str
    gateway: str
    resolver: str = ""
    publishes: tuple[Publish, ...] = ()
    rules: tuple[EgressRule, ...] | None = None
    has_dhcp: bool = False


def add_table(translation: Translation) -> None:
    """Make the guest's table, all of it or nothing.

    Raises:
        HostError: nft is missing, not permitted, or the kernel lacks something.
    """
    run_nft(table(translation))


def remove_table(name: str) -> None:
    """Remove a guest's table; harmless if there is none.

    Raises:
        HostError: As ``add_table``.
    """
    run_nft(f"add table ip {name}\ndelete table ip {name}\n")


def run_nft(script: str) -> None:
    """Have nft carry out a script as one transaction.

    Raises:
        HostError: As ``add_table``.
    """
    command = [find_program("nft", "/usr/sbin/nft", package="nftables"), "-f", "-"]
    # Files rather than pipes: subprocess forgets the first of several pipes if the host has no descriptors for the second.
    with _memory_file() as rules, _memory_file() as output:
        rules.write(script)
        rules.seek(0)
        try:
            done = subprocess.run(
                command, check=False, stdin=rules, stdout=output, stderr=subprocess.STDOUT, timeout=_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise HostError(f"nft has not answered for {_TIMEOUT_S:g} s") from error
        output.seek(0)
        said = output.read()
    if done.returncode != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        raise HostError(
            f"nft refused the rules for a guest: {lines[0] if lines else f'status {done.returncode}'}",
            hint="NAT needs root (CAP_NET_ADMIN) and a kernel with nf_tables and NAT; --net user needs neither",
        )


def _memory_file() -> IO[str]:
    return open(os.memfd_create("nft", os.MFD_CLOEXEC), "w+", encoding="utf-8", errors="replace")


def table(translation: Translation) -> str:
    """The guest's table as a script for nft."""
    chains = {
        "anyone": ("filter", "prerouting", "raw", _source_rules(translation)),
        "reached": ("nat", "prerouting", "dstnat", _reached_rules(translation)),
        "reached_here": ("nat", "output", "-100", _publish_rules(translation.publishes, translation.guest)),
        "left": ("nat", "postrouting", "srcnat", _source_nat_rules(translation)),
        "passing": ("filter", "forward", "filter", _forward_rules(translation)),
        "host": ("filter", "input", "filter", _input_rules(translation)),
    }
    lines = [f"table ip {translation.tap} {{"]
    for name, (kind, hook, priority, rules) in chains.items():
        lines += [f"chain {name} {{", f"type {kind} hook {hook} priority {priority}; policy accept;", *rules, "}"]
    return "\n".join([*lines, "}"]) + "\n"


def _source_rules(translation: Translation) -> Iterator[str]:
    """Frames that pretend: another sender, or the host's own loopback as the destination."""
    tap = f'iifname "{translation.tap}"'
    if translation.has_dhcp:
        yield f"{tap} ip saddr 0.0.0.0 {_DHCP} accept"
    yield f"{tap} ip saddr != {translation.guest} drop"
    yield f"{tap} ip daddr 127.0.0.0/8 drop"


def _reached_rules(translation: Translation) -> Iterator[str]:
    if translation.resolver:
        yield (
            f'iifname "{translation.tap}" ip daddr {translation.gateway} meta l4proto {{ tcp, udp }} '
            f"th dport {_DNS_PORT} dnat to {translation.resolver}"
        )
    outside = [publish for publish in translation.publishes if not publish.is_loopback()]
    for rule in _publish_rules(outside, translation.guest):
        yield f'iifname != "{translation.tap}" {rule}'


def _publish_rules(publishes: Iterable[Publish], guest: str) -> Iterator[str]:
    for publish in publishes:
        where = "fib daddr type local" if publish.is_everywhere() else f"ip daddr {publish.host_address}"
        yield f"{where} {publish.protocol} dport {publish.host_port} dnat to {guest}:{publish.guest_port}"


def _source_nat_rules(translation: Translation) -> Iterator[str]:
    yield f'oifname != "{translation.tap}" ip saddr {translation.guest} masquerade'
    yield f'oifname "{translation.tap}" ip saddr 127.0.0.0/8 masquerade'


def _forward_rules(translation: Translation) -> Iterator[str]:
    yield f'iifname != "{translation.tap}" oifname != "{translation.tap}" accept'
    yield "ct state established,related accept"
    yield from _allow_rules(translation, f'iifname "{translation.tap}"')
    yield f'oifname "{translation.tap}" ct status dnat accept'
    yield from _reject()


def _input_rules(translation: Translation) -> Iterator[str]:
    yield f'iifname != "{translation.tap}" accept'
    yield "ct state established,related accept"
    if translation.has_dhcp:
        yield f"{_DHCP} accept"
    yield from _allow_rules(translation, "")
    yield from _reject()


def _allow_rules(translation: Translation, match: str) -> Iterator[str]:
    if translation.rules is None:
        yield f"{match} accept"
        return
    if translation.resolver:
        asked = f"ct original ip daddr {translation.gateway} ct original proto-dst {_DNS_PORT}"
        yield f"{match} meta l4proto {{ tcp, udp }} {asked} accept"
    for rule in translation.rules:
        if ":" in rule.network:
            continue  # a guest behind NAT has no IPv6
        what = f"{match} ct original ip daddr {rule.network}"
        if rule.port:
            what += f" meta l4proto {{ tcp, udp }} ct original proto-dst {rule.port}"
        yield f"{what} accept"


def _reject() -> Iterator[str]:
    yield "meta l4proto tcp reject with tcp reset"
    yield "reject with icmp type admin-prohibited"
