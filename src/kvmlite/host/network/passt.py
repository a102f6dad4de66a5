"""User networking: passt speaks for the guest with ordinary sockets. Needs no rights at all; IPv4.

The guest's gateway stands for the host's loopback: what listens on 127.0.0.1 of the host, the guest finds there.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

from kvmlite.errors import ConfigError, HostError
from kvmlite.host.daemon import Daemon, find_program
from kvmlite.host.network.address import choose_subnet, parse_range, routed_networks, system_nameservers
from kvmlite.host.network.egress import UDP, EgressRule, native_egress
from kvmlite.host.network.link import GuestAddresses, OpenLink
from kvmlite.host.network.publish import check
from kvmlite.host.network.tap_link import name_rules
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Network

    from kvmlite.host.network.link import Surroundings
    from kvmlite.host.network.publish import Publish

MTU = 65520
"""The largest that passt takes: what a frame costs hardly depends on its size."""

SOCKET_BUFFER = 4 << 20
"""Bytes that each end of the stream may hold for the other, where the host allows as much.

Debian 12's passt sends as much as the guest's TCP window has room for, drops the frames for which the socket has none,
and begins again from there when the guest has noticed, or after two seconds. 208 KiB, which is the default, are three frames.
"""

_RANGE = "10.0.0.0/13"  # its third /24 is what people know from other user networks
_START_TIMEOUT_S = 20.0
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; the socket module does not have it
_GATEWAY_MAC = "52:55:0a:00:02:02"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserLink:
    """A link to passt.

    Attributes:
        mac: Of the guest's interface: passt sends to it before it has heard of it.
        publishes: Ports of the host that lead to the guest.
        rules: All the guest may reach; None for everything. Whoever carries the frames has to see to it.
    """

    mac: bytes
    publishes: tuple[Publish, ...] = ()
    rules: tuple[EgressRule, ...] | None = None

    def __post_init__(self) -> None:
        for publish in self.publishes:
            if self.rules is not None and publish.protocol == "udp":
                raise ConfigError(
                    f"--publish {publish} cannot go with --allow and --net user: what a guest sends by UDP does not "
                    "show whether it is an answer", hint="use --net nat, whose rules know connections",
                )  # fmt: skip

    def open(self, surroundings: Surroundings) -> OpenLink:
        """See ``Link``. Returns when passt answers."""
        if surroundings.queue_pairs > 1:
            raise ConfigError(f"--net user has one queue pair, not {surroundings.queue_pairs}")
        find_program("passt", package="passt")
        check(self.publishes)
        subnet = choose_subnet(parse_range(_RANGE), 24, [parse_range("10.0.0.0/23"), *routed_networks()])
        plan = UserPlan.of(subnet)
        if surroundings.serves_card:
            return OpenLink(back_end=lambda: _start_back_end(plan, self.publishes), guest=self._guest(plan), mtu=MTU)
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            with theirs:
                stack.callback(ours.close)
                _widen(ours)
                _widen(theirs)
                daemon = Daemon(
                    "passt", passt_command(plan, self.publishes, theirs.fileno()), pass_fds=(theirs.fileno(),),
                    package="passt",
                )  # fmt: skip
                stack.callback(daemon.end)
            _wait_ready(ours, self.mac, plan, daemon)
            warn, device = surroundings.warn, surroundings.device
            daemon.watch(
                surroundings.loop, lambda: warn(f"{device}: passt {daemon.end_text()}; the guest has no network")
            )
            return self._opened(plan, ours, stack)

    @property
    def serves_card(self) -> bool:
        """See ``Link``: what a guest may reach is seen to where frames pass through kvmlite."""
        return self.rules is None and _speaks_vhost_user()

    def _guest(self, plan: UserPlan) -> GuestAddresses:
        reachable = None
        if self.rules is not None and not self.publishes:  # who asks a published port may be anywhere
            reachable = tuple(rule.network for rule in plan.seen_from_guest(self.rules))
        return GuestAddresses(
            address=f"{plan.guest}/{plan.prefix_size}",
            gateway=plan.gateway,
            nameservers=plan.nameservers,
            reachable=reachable,
        )

    def _opened(self, plan: UserPlan, ours: socket.socket, stack: contextlib.ExitStack) -> OpenLink:
        egress = self._egress(plan)
        return OpenLink(stream=ours, guest=self._guest(plan), behind=stack.pop_all(), egress=egress, mtu=MTU)

    def _egress(self, plan: UserPlan) -> object:
        if self.rules is None:
            return None
        own = (*name_rules(plan.nameservers), EgressRule(network=plan.gateway, port=67, protocol=UDP))
        return native_egress(
            (*plan.seen_from_guest(self.rules), *own),
            tuple(publish.guest_port for publish in self.publishes),
            source=plan.guest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UserPlan:
    """Who is who on the link.

    Attributes:
        forwarder: Where passt takes questions for a resolver that only the host can ask; empty if that is not needed.
    """

    guest: str
    gateway: str
    prefix_size: int
    forwarder: str
    nameservers: tuple[str, ...]

    @classmethod
    def of(cls, subnet: IPv4Network) -> UserPlan:
        """The addresses people know: the gateway is .2, the forwarder .3, the guest .15."""
        servers = system_nameservers()
        forwarder = str(subnet[3]) if servers and all(server.startswith("127.") for server in servers) else ""
        return cls(
            guest=str(subnet[15]),
            gateway=str(subnet[2]),
            prefix_size=subnet.prefixlen,
            forwarder=forwarder,
            nameservers=(forwarder,) if forwarder else tuple(s for s in servers if not s.startswith("127.")),
        )

    def seen_from_guest(self, rules: tuple[EgressRule, ...]) -> tuple[EgressRule, ...]:
        """What the rules mean on the link: the host's loopback is the gateway, and there is no IPv6."""
        found = []
        for rule in rules:
            if ":" not in rule.network:
                is_loopback = rule.network.startswith("127.")
                network = f"{self.gateway}/32" if is_loopback else rule.network
                found.append(EgressRule(network=network, port=rule.port, protocol=rule.protocol))
        return tuple(found)


def passt_command(plan: UserPlan, publishes: tuple[Publish, ...], fd: int) -> list[str]:
    """passt on a connected socket. The interface lo is only its template: all it would take from it is given."""
    command = [
        "passt", "--foreground", "--quiet", "--fd", str(fd), "--ipv4-only", "--interface", "lo",
        "--address", plan.guest, "--netmask", str(plan.prefix_size), "--gateway", plan.gateway,
        "--mac-addr", _GATEWAY_MAC, "--mtu", str(MTU), "--no-dhcp-search",
    ]  # fmt: skip
    if plan.forwarder:
        command += ["--dns-forward", plan.forwarder]
    for publish in publishes:
        option = "--tcp-ports" if publish.protocol == "tcp" else "--udp-ports"
        command += [option, f"{publish.host_address}/{publish.host_port}:{publish.guest_port}"]
    return command


def _speaks_vhost_user() -> bool:
    """Whether the installed passt serves the queues of a card itself: those since 2024 do, Debian 12's does not."""
    program = shutil.which("passt")
    return program is not None and _has_capabilities(program)


@functools.cache
def _has_capabilities(program: str) -> bool:
    # One that does not know an option writes its whole usage to the system's log: ask only whoever knows the word.
    if b"vhost-user" not in Path(program).read_bytes():
        return False
    done = subprocess.run(
        [program, "--print-capabilities"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=_START_TIMEOUT_S,
    )
    return done.returncode == 0 and b'"net"' in done.stdout


def _start_back_end(plan: UserPlan, publishes: tuple[Publish, ...]) -> tuple[Daemon, socket.socket]:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            command = [*passt_command(plan, publishes, theirs.fileno()), "--vhost-user"]
            return Daemon("passt", command, pass_fds=(theirs.fileno(),), package="passt"), ours
    except BaseException:
        ours.close()
        raise


def _widen(end: socket.socket) -> None:
    """Give it SOCKET_BUFFER; users other than root get no more than ``net.core.wmem_max``."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)


def _wait_ready(stream: socket.socket, mac: bytes, plan: UserPlan, daemon: Daemon) -> None:
    """Ask, as the guest, who has the gateway's address, and wait until passt says so.

    Raises:
        HostError: It ended instead, or does not answer.
    """
    sender, target = socket.inet_aton(plan.guest), socket.inet_aton(plan.gateway)
    request = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, sender, bytes(6), target)
    frame = b"\xff" * 6 + mac + struct.pack(">H", 0x0806) + request
    deadline = time.monotonic() + _START_TIMEOUT_S
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.sendall(struct.pack(">I", len(frame)) + frame)
        while answer := _receive_frame(stream, deadline):
            if answer[12:14] == b"\x08\x06" and answer[28:32] == target:
                return
    if daemon.wait(1.0):
        raise HostError(f"passt {daemon.end_text()}")
    raise HostError(f"passt has not answered for {_START_TIMEOUT_S:g} s")


def _receive_frame(stream: socket.socket, deadline: float) -> bytes:
    """The next frame; empty at the stream's end or the deadline."""
    header = _receive(stream, 4, deadline)
    return _receive(stream, int.from_bytes(header, "big"), deadline) if header else b""


def _receive(stream: socket.socket, size: int, deadline: float) -> bytes:
    """So many bytes; none at the stream's end or the deadline."""
    data = b""
    while len(data) < size:
        stream.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            part = stream.recv(size - len(data))
        except TimeoutError:
            return b""
        if not part:
            return b""
        data += part
    return data
