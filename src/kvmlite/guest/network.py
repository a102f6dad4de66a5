"""How an interface of the guest shall be configured, and its wire format.

NETWORK, little-endian::

    0 u8[6] MAC / 6 le16 MTU, 0 to leave it / 8 le16 count of addresses / 10 le16 count of routes
    each address:  0 u8 family (4 or 6) / 1 u8 prefix size / 2 u8[16] address
    each route:    0 u8 family / 1 u8 prefix size / 2 u8[16] destination / 18 u8[16] gateway, zeros for the link itself
    then the text of /etc/resolv.conf; without one the file is left alone

An IPv4 address is the first four of its sixteen bytes, in network byte order like all of them.
"""

from __future__ import annotations

import struct

from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HEAD = struct.Struct("<6sHHH")
_ADDRESS = struct.Struct("<BB16s")
_ROUTE = struct.Struct("<BB16s16s")
_ENTRIES_MAX = 256
_TEXT_MAX = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A way out of the guest.

    Attributes:
        destination: In CIDR form; ``0.0.0.0/0`` is the default route.
        gateway: An address; empty if the destination is on the link.
    """

    destination: str
    gateway: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """One interface of the guest.

    Attributes:
        mac: Of the interface meant: ``52:54:00:12:34:56``.
        mtu: Bytes; 0 leaves the driver's.
        addresses: With their prefix: ``10.0.2.15/24``, ``fd00::2/64``.
        routes: Added in this order.
        resolv_conf: Text of ``/etc/resolv.conf``; empty to leave it alone.
    """

    mac: str
    mtu: int = 0
    addresses: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    resolv_conf: str = ""


def parse_mac(text: str) -> bytes:
    """Six bytes from ``52:54:00:12:34:56``.

    Raises:
        ConfigError: It is not of this form.
    """
    parts = text.split(":")
    try:
        mac = bytes(int(part, 16) for part in parts)
    except ValueError:
        mac = b""
    if len(mac) != 6 or any(len(part) != 2 for part in parts):
        raise ConfigError(f"{text!r} is no MAC address", hint="write six bytes: 52:54:00:12:34:56")
    return mac


def encode_settings(settings: NetworkSettings) -> bytes:
    """The payload of NETWORK.

    Raises:
        ConfigError: An address is none, or there is too much of anything.
    """
    text = settings.resolv_conf.encode()
    if max(len(settings.addresses), len(settings.routes)) > _ENTRIES_MAX or len(text) > _TEXT_MAX:
        raise ConfigError("more network settings for the guest than the agent takes")
    head = _HEAD.pack(parse_mac(settings.mac), settings.mtu, len(settings.addresses), len(settings.routes))
    addresses = b"".join(_encode_address(address) for address in settings.addresses)
    return head + addresses + b"".join(_encode_route(route) for route in settings.routes) + text


def _encode_address(text: str) -> bytes:
    address = _parse("ip_interface", text)
    return _ADDRESS.pack(address.version, address.network.prefixlen, address.ip.packed)


def _encode_route(route: Route) -> bytes:
    network = _parse("ip_network", route.destination)
    gateway = _parse("ip_address", route.gateway).packed if route.gateway else b""
    return _ROUTE.pack(network.version, network.prefixlen, network.network_address.packed, gateway)


def _parse(kind: str, text: str) -> Any:
    import ipaddress

    try:
        return getattr(ipaddress, kind)(text)
    except ValueError as error:
        raise ConfigError(f"network of the guest: {error}") from error
