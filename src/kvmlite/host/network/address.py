"""Addresses for guests: networks that the host has no route to, and the resolver its own programs ask."""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Network

_ROUTES = "/proc/thread-self/net/route"
_RESOLV_CONF = "/etc/resolv.conf"
_RESOLVED_UPSTREAM = "/run/systemd/resolve/resolv.conf"


def parse_range(text: str) -> IPv4Network:
    """A network that guests' subnets are taken from.

    Raises:
        ConfigError: It is none of IPv4, or too small to hold one.
    """
    from ipaddress import IPv4Network

    try:
        network = IPv4Network(text)
    except ValueError as error:
        raise ConfigError(f"range {text!r}: {error}", hint="write an IPv4 network: 10.213.0.0/16") from error
    if network.prefixlen > 30:
        raise ConfigError(f"range {text!r} holds no subnet: each guest needs four addresses")
    return network


def routed_networks(path: str = _ROUTES) -> tuple[IPv4Network, ...]:
    """Networks this host has a route to, without the default route."""
    from ipaddress import IPv4Network
    from socket import ntohl

    found = []
    with open(path, encoding="ascii") as file:
        for line in file.read().splitlines()[1:]:
            fields = line.split()
            address, mask = ntohl(int(fields[1], 16)), ntohl(int(fields[7], 16))
            if mask:
                found.append(IPv4Network((address, mask.bit_count())))
    return tuple(found)


def choose_subnet(within: IPv4Network, prefix_size: int, taken: Iterable[IPv4Network]) -> IPv4Network:
    """The first subnet that overlaps none of ``taken``.

    Raises:
        HostError: There is none left.
    """
    used = [network for network in taken if network.overlaps(within)]
    for subnet in within.subnets(new_prefix=max(prefix_size, within.prefixlen)):
        if not any(subnet.overlaps(network) for network in used):
            return subnet
    raise HostError(
        f"no subnet is left in {within}: the host has routes to all of it",
        hint="give another range: --net nat,range=CIDR",
    )


def system_nameservers(path: str = _RESOLV_CONF) -> tuple[str, ...]:
    """The host's IPv4 resolvers, as its own programs know them."""
    return _nameservers(path)


def nameservers(path: str = _RESOLV_CONF, upstream: str = _RESOLVED_UPSTREAM) -> tuple[str, ...]:
    """The host's IPv4 resolvers. Where its own is a stub that answers only on its loopback, those behind it."""
    found = _nameservers(path)
    if all(server.startswith("127.") for server in found) and os.path.exists(upstream):
        found = _nameservers(upstream) or found
    return found


def _nameservers(path: str) -> tuple[str, ...]:
    from ipaddress import AddressValueError, IPv4Address

    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return ()
    found = []
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "nameserver":
            try:
                found.append(str(IPv4Address(rest.strip())))
            except AddressValueError:  # of IPv6, or nonsense: neither is for us
                continue
    return tuple(found)
