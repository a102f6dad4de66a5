"""Ports of the host that lead to a guest: ``--publish [HOSTADDR:]HOST:GUEST[/udp]``."""

from __future__ import annotations

import errno
import socket

from kvmlite.errors import ConfigError, HostError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

PUBLISH_HINT = "write [HOSTADDR:]HOSTPORT:GUESTPORT[/udp]: 8080:80, 0.0.0.0:2222:22, 5353:53/udp"
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """One ``--publish``.

    Attributes:
        host_address: Where the host listens, IPv4; ``0.0.0.0`` for all its addresses.
        protocol: ``tcp`` or ``udp``.
    """

    host_port: int
    guest_port: int
    host_address: str = LOOPBACK
    protocol: str = "tcp"

    def is_everywhere(self) -> bool:
        """Whether all addresses of the host are meant."""
        return self.host_address == EVERYWHERE

    def is_loopback(self) -> bool:
        """Whether only the host's own programs are meant."""
        return self.host_address.startswith("127.")

    def __str__(self) -> str:
        return f"{self.host_address}:{self.host_port}:{self.guest_port}/{self.protocol}"


def parse_publish(text: str) -> Publish:
    """``[HOSTADDR:]HOST:GUEST[/udp]``; without HOSTADDR, the host's loopback.

    Raises:
        ConfigError: It is not of this form.
    """
    from ipaddress import AddressValueError, IPv4Address

    ports, _, protocol = text.partition("/")
    *address, host, guest = [LOOPBACK, *ports.split(":")] if ports.count(":") < 2 else ports.split(":")
    if protocol not in ("", "tcp", "udp"):
        raise ConfigError(f"--publish {text!r}: {protocol!r} is neither tcp nor udp", hint=PUBLISH_HINT)
    if len(address) != 1 or not host or not guest:
        raise ConfigError(f"--publish {text!r} is not two ports with an IPv4 address before them", hint=PUBLISH_HINT)
    for port in (host, guest):
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"--publish {text!r}: port {port!r} is not from 1 to 65535", hint=PUBLISH_HINT)
    try:
        host_address = str(IPv4Address(address[0]))
    except AddressValueError as error:
        raise ConfigError(f"--publish {text!r}: {address[0]!r} is no IPv4 address", hint=PUBLISH_HINT) from error
    return Publish(
        host_port=int(host), guest_port=int(guest), host_address=host_address, protocol=protocol or "tcp"
    )  # fmt: skip


def parse_publishes(texts: Iterable[str]) -> tuple[Publish, ...]:
    """Read each ``--publish`` of a guest.

    Raises:
        ConfigError: One is not of its form, or two want the same port of the host.
    """
    found: list[Publish] = []
    for text in texts:
        publish = parse_publish(text)
        for other in found:
            is_same = (other.host_port, other.protocol) == (publish.host_port, publish.protocol)
            is_met = other.host_address == publish.host_address or other.is_everywhere() or publish.is_everywhere()
            if is_same and is_met:
                raise ConfigError(
                    f"--publish {text!r}: port {publish.host_port} of the host leads to port {other.guest_port} already",
                    hint="choose another port of the host",
                )
        found.append(publish)
    return tuple(found)


def reserve(publishes: tuple[Publish, ...]) -> list[socket.socket]:
    """Bind the ports, so that nobody else takes them while the guest runs; the caller closes the sockets.

    Raises:
        HostError: A port is in use, or below 1024 and we may not have it.
    """
    return _bind(publishes, reuse=False)


def check(publishes: tuple[Publish, ...]) -> None:
    """See whether another program could bind the ports now, as one that listens does.

    Raises:
        HostError: As ``reserve``.
    """
    for holder in _bind(publishes, reuse=True):
        holder.close()


def _bind(publishes: tuple[Publish, ...], *, reuse: bool) -> list[socket.socket]:
    held: list[socket.socket] = []
    for publish in publishes:
        is_tcp = publish.protocol == "tcp"
        try:
            holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM)
            held.append(holder)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse and is_tcp))
            holder.bind((publish.host_address, publish.host_port))
        except OSError as error:
            for other in held:
                other.close()
            raise _explain(publish, error) from error
    return held


def _explain(publish: Publish, error: OSError) -> HostError:
    hints = {
        errno.EADDRINUSE: "another program has it; choose another port of the host",
        errno.EACCES: "ports below net.ipv4.ip_unprivileged_port_start are root's; choose a higher one",
        errno.EADDRNOTAVAIL: "the host has no such address",
    }
    code = error.errno or 0
    return HostError(
        f"cannot publish port {publish.host_address}:{publish.host_port}/{publish.protocol}: {error.strerror}", code,
        hint=hints.get(code, ""),
    )  # fmt: skip
