"""NAT: out through the host's address, in through published ports, refusals, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.namespace import LinkGuest, Namespace, connected

from kvmlite.errors import HostError
from kvmlite.host.network.egress import EgressRule
from kvmlite.host.network.journal import Journal, Note, namespace
from kvmlite.host.network.link import OpenLink
from kvmlite.host.network.nat import NatLink
from kvmlite.host.network.publish import parse_publish
from kvmlite.host.network.sweep import sweep

from .conftest import answers, serving

pytestmark = [pytest.mark.root, pytest.mark.tools]
Open = Callable[[NatLink], OpenLink]


def traces(host: Namespace, home: Path) -> list[str]:
    """What there is of guests' networks on the host."""

    def look() -> list[str]:
        tables = subprocess.run(
            ["nft", "list", "tables"], check=True, capture_output=True, text=True, timeout=10
        ).stdout
        taps = [name for _, name in socket.if_nameindex() if name.startswith("kvl")]
        forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()
        return [*tables.split("\n")[:-1], *taps, *(["forwarding"] if forwarding != "0" else [])]

    notes = [path.name for path in (home / "run/network").glob("*.json")] if home.exists() else []
    return host.call(look) + notes


@pytest.fixture
def outside(host: Namespace) -> Namespace:
    """Another host, which knows no way to the guest: only to the host's 192.0.2.1."""
    host.ip("link", "set", "lo", "up")
    with Namespace() as namespace, connected(host, namespace, "192.0.2.1", "192.0.2.2"):
        yield namespace


def test_the_guest_goes_out_under_the_hosts_address(host: Namespace, outside: Namespace, open_link: Open) -> None:
    link = open_link(NatLink())
    assert (link.guest.address, link.guest.gateway) == ("10.213.0.2/30", "10.213.0.1")
    with LinkGuest(link) as guest, serving(outside, "192.0.2.2", 80), serving(host, "0.0.0.0", 8080):
        assert answers(guest, "192.0.2.2", 80) == b"192.0.2.2:80 to 192.0.2.1"
        assert answers(guest, "10.213.0.1", 8080) == b"0.0.0.0:8080 to 10.213.0.2"


def test_published_ports_lead_to_the_guest_from_wherever_they_are_published(
    host: Namespace, outside: Namespace, open_link: Open
) -> None:
    publishes = ("8080:80", "0.0.0.0:8081:80", "192.0.2.1:8082:80")
    link = open_link(NatLink(publishes=tuple(map(parse_publish, publishes)), rules=()))
    with LinkGuest(link) as guest, serving(guest, "0.0.0.0", 80):
        assert answers(host, "127.0.0.1", 8080) == b"0.0.0.0:80 to 10.213.0.1"
        assert answers(host, "127.0.0.1", 8081) == b"0.0.0.0:80 to 10.213.0.1"
        assert answers(host, "192.0.2.1", 8082) == b"0.0.0.0:80 to 192.0.2.1"
        assert answers(outside, "192.0.2.1", 8081) == b"0.0.0.0:80 to 192.0.2.2"
        assert answers(outside, "192.0.2.1", 8082) == b"0.0.0.0:80 to 192.0.2.2"
        for port in (80, 8080):
            with pytest.raises(ConnectionRefusedError):
                answers(outside, "192.0.2.1", port)


def test_only_what_is_allowed_can_be_reached_and_the_rest_is_refused_at_once(
    host: Namespace, outside: Namespace, open_link: Open
) -> None:
    rules = (EgressRule(network="192.0.2.2/32", port=80), EgressRule(network="127.0.0.1/32", port=8080))
    link = open_link(NatLink(rules=rules))
    with LinkGuest(link) as guest:
        with serving(outside, "192.0.2.2", 80), serving(outside, "192.0.2.2", 81), serving(host, "0.0.0.0", 8080):
            assert answers(guest, "192.0.2.2", 80) == b"192.0.2.2:80 to 192.0.2.1"
            assert answers(guest, "10.213.0.1", 8080) == b"0.0.0.0:8080 to 10.213.0.2"
            for address, port in (("192.0.2.2", 81), ("192.0.2.1", 8080), ("10.213.0.1", 8081)):
                with pytest.raises(ConnectionRefusedError):  # what is dropped ends by timeout
                    answers(guest, address, port)


def test_a_guest_that_takes_another_address_or_the_hosts_loopback_is_not_heard(
    host: Namespace, outside: Namespace, open_link: Open
) -> None:
    link = open_link(NatLink())
    with LinkGuest(link) as guest, serving(outside, "192.0.2.2", 80), serving(host, "127.0.0.1", 8080):
        guest.call(Path("/proc/sys/net/ipv4/conf/eth0/route_localnet").write_text, "1")
        guest.ip("addr", "del", "127.0.0.1/8", "dev", "lo")
        guest.ip("route", "add", "127.0.0.0/8", "via", link.guest.gateway, "src", "10.213.0.2")
        with pytest.raises(OSError, match=r"timed out|unreachable|Invalid"):
            answers(guest, "127.0.0.1", 8080, timeout_s=0.3)
        guest.ip("addr", "add", "192.0.2.77/32", "dev", "eth0")
        guest.ip("route", "replace", "default", "via", link.guest.gateway, "src", "192.0.2.77")
        with pytest.raises(TimeoutError):
            answers(guest, "192.0.2.2", 80, timeout_s=0.3)


def test_guests_have_subnets_of_their_own_and_do_not_see_each_other(host: Namespace, open_link: Open) -> None:
    host.ip("route", "add", "10.213.0.4/30", "dev", "lo")
    first, second = open_link(NatLink()), open_link(NatLink())
    assert [link.guest.gateway for link in (first, second)] == ["10.213.0.1", "10.213.0.9"]
    with LinkGuest(first) as one, LinkGuest(second) as two, serving(two, "0.0.0.0", 80):
        with pytest.raises(ConnectionRefusedError):
            answers(one, "10.213.0.10", 80)


def test_the_resolver_of_the_host_answers_at_the_gateway(
    host: Namespace, outside: Namespace, open_link: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvmlite.host.network.nat as module

    monkeypatch.setattr(module, "nameservers", lambda: ("192.0.2.2",))
    link = open_link(NatLink(rules=()))
    assert link.guest.nameservers == ("10.213.0.1",)
    with LinkGuest(link) as guest, serving(outside, "192.0.2.2", 53):
        assert answers(guest, "10.213.0.1", 53) == b"192.0.2.2:53 to 192.0.2.1"
        with pytest.raises(ConnectionRefusedError):
            answers(guest, "192.0.2.2", 53)


def test_nothing_is_left_and_forwarding_is_off_again_when_the_last_guest_has_ended(
    host: Namespace, home: Path, open_link: Open
) -> None:
    assert traces(host, home) == []
    first, second = open_link(NatLink()), open_link(NatLink(publishes=(parse_publish("8080:80"),)))
    assert "forwarding" in traces(host, home)
    assert len(traces(host, home)) == 7  # each: table, TAP, note
    host.call(first.close)
    assert len(traces(host, home)) == 4
    host.call(second.close)
    assert traces(host, home) == []


def test_forwarding_that_was_on_stays_on(host: Namespace, home: Path, open_link: Open) -> None:
    host.call(Path("/proc/sys/net/ipv4/ip_forward").write_text, "1")
    host.call(open_link(NatLink()).close)
    assert traces(host, home) == ["forwarding"]


def test_what_a_killed_process_left_is_swept_at_the_next_start(host: Namespace, home: Path, open_link: Open) -> None:
    code = (
        "import sys, time\n"
        "from kvmlite.host.loop import DeviceLoop\n"
        "from kvmlite.host.network.link import Surroundings\n"
        "from kvmlite.host.network.nat import NatLink\n"
        "link = NatLink().open(Surroundings(device='net0', queue_pairs=1, loop=DeviceLoop(print), warn=print))\n"
        "print('open', flush=True)\n"
        "time.sleep(100)\n"
    )
    process = host.call(lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert host.call(sweep) == ()
        assert "runs" in network_command(host, "ls")
        process.kill()
    left = traces(host, home)
    assert len(left) == 3  # table, forwarding, note; the TAP is gone by itself
    (note,) = (home / "run/network").glob("*.json")
    assert json.loads(note.read_text())["pid"] == process.pid
    with Namespace() as elsewhere:
        assert elsewhere.call(sweep) == ()  # another host's, so to say
    assert network_command(host, "ls").split()[4:] == [note.stem, "10.213.0.0/30", str(process.pid), "was", "killed"]
    link = open_link(NatLink())
    assert link.guest.address == "10.213.0.2/30"
    assert len(traces(host, home)) == 4
    host.call(link.close)
    assert traces(host, home) == []


def network_command(host: Namespace, *arguments: str) -> str:
    """What ``kvmlite network`` prints, on that host."""

    def run() -> str:
        command = [sys.executable, "-m", "kvmlite.cli.main", "network", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    return host.call(run)


def test_what_was_left_can_be_swept_without_another_guest(host: Namespace, home: Path) -> None:
    left = Note(
        name="kvl00000000", pid=os.getpid(), start_ticks=1, namespace=host.call(namespace), subnet="10.213.0.0/30",
        turned_on_forwarding=True,
    )  # fmt: skip
    journal = Journal(str(home / "run/network"))
    with journal.locked():
        journal.write(left)
    host.call(Path("/proc/sys/net/ipv4/ip_forward").write_text, "1")
    assert json.loads(network_command(host, "ls", "--json")) == [
        {"name": "kvl00000000", "subnet": "10.213.0.0/30", "pid": os.getpid(), "is_running": False}
    ]
    assert network_command(host, "ls", "-q") == "kvl00000000\n"
    assert network_command(host, "sweep") == "kvl00000000\n"
    assert network_command(host, "ls") == network_command(host, "sweep") == ""
    assert traces(host, home) == []


def test_a_failure_half_way_leaves_nothing(
    host: Namespace, home: Path, open_link: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmlite.host.network.firewall.table", lambda translation: "add table ip kvlx\nnonsense\n")
    with pytest.raises(HostError, match="nft refused"):
        open_link(NatLink(publishes=(parse_publish("8080:80"),)))
    assert traces(host, home) == []
    monkeypatch.undo()
    with serving(host, "127.0.0.1", 8080), pytest.raises(HostError, match="8080"):
        open_link(NatLink(publishes=(parse_publish("8080:80"),)))


def test_dhcp_gives_the_guest_its_address(host: Namespace, open_link: Open) -> None:
    link = open_link(NatLink(has_dhcp=True, rules=()))
    with LinkGuest(link) as guest:
        offer = guest.call(discover)
    assert offer[16:20] == socket.inet_aton("10.213.0.2")


def discover() -> bytes:
    """Ask for an address as a client does that has none; the offer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        client.bind(("0.0.0.0", 68))
        client.settimeout(0.5)
        mac = bytes.fromhex("525400123456")
        head = bytes([1, 1, 6, 0]) + b"kvml" + bytes(2) + b"\x80\x00" + bytes(16) + mac.ljust(16, b"\x00")
        for _ in range(100):  # dnsmasq may still be starting
            client.sendto(head + bytes(192) + b"\x63\x82\x53\x63\x35\x01\x01\xff", ("255.255.255.255", 67))
            with contextlib.suppress(TimeoutError):
                return client.recv(2000)
    raise TimeoutError("no offer")


def test_without_rights_the_error_names_the_mode_that_needs_none() -> None:
    code = (
        "from kvmlite.errors import HostError\n"
        "from kvmlite.host.network.nat import NatLink\n"
        "try:\n    NatLink().open(None)\n"
        "except HostError as error:\n    print(error, '|', error.hint)\n"
    )
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    done = subprocess.run(
        [*nobody, sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30, cwd="/",
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert "CAP_NET_ADMIN" in done.stdout
    assert "--net user" in done.stdout
