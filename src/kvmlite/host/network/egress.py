"""What a guest may reach: ``--allow`` as people write it, as rules, and as the table the C filter reads.

A rule without a port stands for TCP, UDP and ICMP; with one, for TCP and UDP to that port. Host names are looked up
once, when the guest is made: the guest may reach the addresses they had then.
"""

from __future__ import annotations

from kvmlite.errors import ConfigError, HostError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

ALLOW_HINT = "write CIDR or HOST, with :PORT if only one is meant: 10.0.0.0/8, example.org:443, [2001:db8::1]:22"
MAX_RULES = 256
MAX_REPLY_PORTS = 64
UDP = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    """One ``--allow``.

    Attributes:
        target: An address, a network (``10.0.0.0/8``) or a host name.
        port: 0 for all.
    """

    target: str
    port: int = 0

    def is_name(self) -> bool:
        """Whether the target has to be looked up."""
        return _network(self.target) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressRule:
    """One destination a guest may reach.

    Attributes:
        network: In CIDR form: ``10.0.0.0/8``, ``2001:db8::1/128``.
        port: 0 for all.
        protocol: ``IPPROTO_UDP`` or ``IPPROTO_TCP``; 0 for both, and for ICMP if there is no port either.
    """

    network: str
    port: int = 0
    protocol: int = 0


def parse_allow(text: str) -> Allow:
    """``CIDR|HOST[:PORT]``.

    Raises:
        ConfigError: It is not of this form.
    """
    target, port = text, ""
    if text.startswith("["):
        target, closed, port = text[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise ConfigError(f"--allow {text!r}: the bracket is not closed before the port", hint=ALLOW_HINT)
        port = port[1:] if port else ""
        if text.endswith(":"):
            raise ConfigError(f"--allow {text!r}: no port behind the colon", hint=ALLOW_HINT)
    elif text.count(":") == 1:
        target, _, port = text.partition(":")
        if not port:
            raise ConfigError(f"--allow {text!r}: no port behind the colon", hint=ALLOW_HINT)
    allow = Allow(target=target, port=_parse_port(port, text) if port else 0)
    if allow.is_name() and not _is_host_name(target):
        raise ConfigError(f"--allow {text!r} names neither a network, an address nor a host", hint=ALLOW_HINT)
    return allow


def resolve(allows: Iterable[Allow]) -> tuple[EgressRule, ...]:
    """The rules of ``--allow``; looks names up.

    Raises:
        HostError: A name cannot be looked up.
        ConfigError: More than 256 rules.

    Blocks as long as the host's resolver does.
    """
    rules = []
    for allow in allows:
        networks = (allow.target,) if not allow.is_name() else _look_up(allow.target)
        rules += [EgressRule(network=str(_network(network)), port=allow.port) for network in networks]
    unique = tuple(dict.fromkeys(rules))
    if len(unique) > MAX_RULES:
        raise ConfigError(f"--allow stands for {len(unique)} destinations, at most {MAX_RULES} are possible")
    return unique


def native_egress(rules: Sequence[EgressRule], reply_ports: Sequence[int] = (), source: str = "") -> Any:
    """``struct kvl_egress *`` for a worker in C, which keeps to it while this object lives.

    Args:
        reply_ports, source: TCP ports the guest serves, and the IPv4 address it has to use; see ``egress.h``.

    Raises:
        ConfigError: More rules or ports than there is room for.
    """
    from ipaddress import ip_address

    from kvmlite._native import ffi

    if len(rules) > MAX_RULES or len(reply_ports) > MAX_REPLY_PORTS:
        raise ConfigError(
            f"{len(rules)} rules and {len(reply_ports)} ports; at most {MAX_RULES} and {MAX_REPLY_PORTS} are possible"
        )
    egress = ffi.new("struct kvl_egress *")
    egress.rule_count, egress.reply_count = len(rules), len(reply_ports)
    for index, rule in enumerate(rules):
        network = _network(rule.network)
        if network is None:
            raise ValueError(f"{rule.network!r} is no network")
        slot = egress.rules[index]
        slot.family, slot.prefix_size = network.version, network.prefixlen
        slot.protocol, slot.port = rule.protocol, rule.port
        slot.address = network.network_address.packed.ljust(16, b"\x00")
    if source:
        egress.has_source, egress.source = True, ip_address(source).packed
    for index, port in enumerate(reply_ports):
        egress.reply_ports[index] = port
    return egress


def _network(text: str) -> Any:
    """An ``ipaddress`` network, or None if it is a name."""
    from ipaddress import ip_network

    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def _look_up(name: str) -> tuple[str, ...]:
    from socket import SOCK_STREAM, gaierror, getaddrinfo

    try:
        found = getaddrinfo(name, None, type=SOCK_STREAM)
    except (gaierror, UnicodeError) as error:
        raise HostError(
            f"--allow {name}: the host cannot look this name up: {error}", hint="give an address instead of the name"
        ) from error
    return tuple(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def _is_host_name(text: str) -> bool:
    labels = text.removesuffix(".").split(".")
    letters = all(label and label.replace("-", "a").replace("_", "a").isalnum() for label in labels)
    return letters and len(text) < 254 and not labels[-1].isdigit()


def _parse_port(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigError(f"--allow {whole!r}: port {text!r} is not from 1 to 65535", hint=ALLOW_HINT)
    return int(text)
