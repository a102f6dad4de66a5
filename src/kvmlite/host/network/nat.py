"""NAT: a TAP with a subnet of its own, behind the host's addresses. IPv4 only; needs root.

The interface has the subnet's first address, the guest its second. Guests behind NAT do not see each other.
"""

from __future__ import annotations

import contextlib
import errno
import os

from kvmlite.errors import HostError
from kvmlite.host.network import firewall, forwarding
from kvmlite.host.network.address import choose_subnet, nameservers, parse_range, routed_networks
from kvmlite.host.network.egress import EgressRule
from kvmlite.host.network.interfaces import Interfaces
from kvmlite.host.network.journal import Journal, Note, namespace, start_ticks
from kvmlite.host.network.link import GuestAddresses, OpenLink
from kvmlite.host.network.publish import reserve
from kvmlite.host.network.sweep import journal_directory, put_back, sweep_locked
from kvmlite.host.network.tap_link import new_name
from kvmlite.host.tap import make_tap
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Network

    from kvmlite.host.network.link import Surroundings
    from kvmlite.host.network.publish import Publish

DEFAULT_RANGE = "10.213.0.0/16"
_PREFIX_SIZE = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class NatLink:
    """A subnet of the guest's own, translated to the host's addresses.

    Attributes:
        range: Where the subnet of four addresses is taken from; the first that the host has no route to.
        publishes: Ports of the host that lead to the guest.
        rules: All the guest may reach; None for everything. The host's firewall sees to it.
        has_dhcp: Answer DHCP on the link, for guests that insist (dnsmasq).
    """

    serves_card = False

    range: str = DEFAULT_RANGE
    publishes: tuple[Publish, ...] = ()
    rules: tuple[EgressRule, ...] | None = None
    has_dhcp: bool = False

    def __post_init__(self) -> None:
        parse_range(self.range)

    def open(self, surroundings: Surroundings) -> OpenLink:
        """See ``Link``. Puts back first what killed processes have left."""
        if os.geteuid() != 0 and not _may_administer():
            raise HostError(
                "NAT changes the host's network, which needs CAP_NET_ADMIN", errno.EPERM,
                hint="run as root, or use --net user, which needs no rights",
            )  # fmt: skip
        journal = Journal(journal_directory())
        with contextlib.ExitStack() as stack:
            for holder in reserve(self.publishes):
                stack.callback(holder.close)
            with journal.locked():
                sweep_locked(journal)
                note = self._note(journal)
                journal.write(note)
                stack.callback(_close, journal, note)
                return self._open(note, surroundings, stack)

    def _note(self, journal: Journal) -> Note:
        from ipaddress import IPv4Network

        notes = journal.notes()
        taken = [*routed_networks(), *(IPv4Network(note.subnet) for note in notes)]
        pid = os.getpid()
        return Note(
            name=new_name(),
            pid=pid,
            start_ticks=start_ticks(pid),
            namespace=namespace(),
            subnet=str(choose_subnet(parse_range(self.range), _PREFIX_SIZE, taken)),
            turned_on_forwarding=not forwarding.is_on() or any(note.turned_on_forwarding for note in notes),
        )

    def _open(self, note: Note, surroundings: Surroundings, stack: contextlib.ExitStack) -> OpenLink:
        from ipaddress import IPv4Network

        subnet = IPv4Network(note.subnet)
        gateway, guest = str(subnet[1]), str(subnet[2])
        resolver = next(iter(nameservers()), "")
        rules = None if self.rules is None else tuple(_seen_from_guest(self.rules, gateway))
        tap = make_tap(note.name, queue_pairs=surroundings.queue_pairs)
        try:
            _prepare(note.name, gateway, subnet)
            firewall.add_table(
                firewall.Translation(
                    tap=note.name, guest=guest, gateway=gateway, resolver=resolver, publishes=self.publishes,
                    rules=rules, has_dhcp=self.has_dhcp,
                )
            )  # fmt: skip
            if not forwarding.is_on():
                forwarding.turn(True)
            if self.has_dhcp:
                self._serve_dhcp(note.name, gateway, guest, surroundings, stack)
        except BaseException:
            tap.close()
            raise
        addresses = GuestAddresses(
            address=f"{guest}/{subnet.prefixlen}",
            gateway=gateway,
            nameservers=(gateway,) if resolver else (),
        )
        return OpenLink(tap=tap, guest=addresses, behind=stack.pop_all())

    def _serve_dhcp(
        self, tap: str, gateway: str, guest: str, surroundings: Surroundings, stack: contextlib.ExitStack
    ) -> None:
        from kvmlite.host.daemon import Daemon, find_program

        program = find_program("dnsmasq", "/usr/sbin/dnsmasq", package="dnsmasq-base")
        daemon = Daemon("dnsmasq", dhcp_command(program, tap, gateway, guest))
        stack.callback(daemon.end)
        warn, device = surroundings.warn, surroundings.device
        daemon.watch(
            surroundings.loop, lambda: warn(f"{device}: dnsmasq {daemon.end_text()}: DHCP is not answered any more")
        )


def dhcp_command(program: str, tap: str, gateway: str, guest: str) -> list[str]:
    """dnsmasq for one interface and one lease; no DNS, no files.

    As root, it is made nobody's before it runs: it would do that itself, but then outlive us if we are killed.
    """
    command = [
        program, "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--leasefile-ro", "--port=0",
        "--log-facility=-", "--no-ping", f"--interface={tap}", "--bind-interfaces", "--dhcp-authoritative",
        f"--dhcp-range={guest},{guest},255.255.255.252,1h", f"--dhcp-option=option:router,{gateway}",
        f"--dhcp-option=option:dns-server,{gateway}",
    ]  # fmt: skip
    if os.geteuid() != 0:
        return command
    capabilities = "-all,+net_bind_service,+net_raw,+net_admin"
    return [
        "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig=KILL",
        f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}", f"--bounding-set={capabilities}", "--", *command,
    ]  # fmt: skip


def _prepare(tap: str, gateway: str, subnet: IPv4Network) -> None:
    """The host's end of the link: IPv4 only, and before it is up."""
    if os.path.exists(f"/proc/sys/net/ipv6/conf/{tap}"):
        forwarding.set_interface(tap, "disable_ipv6", "1", family="ipv6")
    forwarding.set_interface(tap, "forwarding", "1")
    forwarding.set_interface(tap, "route_localnet", "1")  # connections of the host's loopback to published ports
    with Interfaces() as interfaces:
        interfaces.add_address(tap, gateway, subnet.prefixlen)
        interfaces.raise_up(tap)


def _seen_from_guest(rules: tuple[EgressRule, ...], gateway: str) -> list[EgressRule]:
    """The host's loopback is the gateway to a guest."""
    return [
        EgressRule(network=f"{gateway}/32", port=rule.port, protocol=rule.protocol)
        if rule.network.startswith("127.")
        else rule
        for rule in rules
    ]


def _close(journal: Journal, note: Note) -> None:
    with journal.locked():
        put_back(journal, note)


def _may_administer() -> bool:
    from kvmlite.host.facts import CAP_NET_ADMIN, HostFiles, has_capability

    return has_capability(HostFiles(), CAP_NET_ADMIN)
