"""User networking over passt: the host's loopback, published ports, what is refused; with no rights at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.namespace import GUEST_MAC, LinkGuest, Namespace, connected

from kvmlite.errors import ConfigError, HostError
from kvmlite.host.network.egress import EgressRule
from kvmlite.host.network.link import OpenLink
from kvmlite.host.network.passt import MTU, UserLink, UserPlan, passt_command
from kvmlite.host.network.publish import Publish, parse_publish

from .conftest import answers, serving

Open = Callable[[UserLink], OpenLink]


pytestmark = pytest.mark.tools

MAC = bytes.fromhex(GUEST_MAC.replace(":", ""))


def user_link(**options: Any) -> UserLink:
    return UserLink(mac=MAC, **options)


def test_the_command_says_all_that_passt_would_guess() -> None:
    plan = UserPlan(
        guest="10.0.2.15", gateway="10.0.2.2", prefix_size=24, forwarder="10.0.2.3", nameservers=("10.0.2.3",)
    )
    command = passt_command(plan, (Publish(host_port=53, guest_port=5353, protocol="udp"),), 7)
    assert " ".join(command[:6]) == "passt --foreground --quiet --fd 7 --ipv4-only"
    assert command[-4:] == ["--dns-forward", "10.0.2.3", "--udp-ports", "127.0.0.1/53:5353"]


@pytest.mark.root
def test_the_guest_finds_the_hosts_loopback_at_its_gateway(host: Namespace, open_link: Open) -> None:
    with serving(host, "127.0.0.1", 8080):
        link = open_link(user_link())
        assert (link.guest.address, link.mtu) == ("10.0.2.15/24", MTU)
        with LinkGuest(link) as guest:
            assert answers(guest, link.guest.gateway, 8080) == b"127.0.0.1:8080 to 127.0.0.1"


@pytest.mark.root
def test_what_is_not_allowed_is_refused_on_the_host(host: Namespace, open_link: Open) -> None:
    rules = (EgressRule(network="127.0.0.1/32", port=8080), EgressRule(network="2001:db8::/32"))
    with serving(host, "127.0.0.1", 8080), serving(host, "127.0.0.1", 8081):
        assert open_link(user_link(rules=rules)).guest.reachable == ("10.0.2.2/32",)
        link = open_link(user_link(rules=rules, publishes=(parse_publish("2222:22"),)))
        with LinkGuest(link) as guest, serving(guest, "0.0.0.0", 22):
            assert answers(guest, "10.0.2.2", 8080) == b"127.0.0.1:8080 to 127.0.0.1"
            before = guest.refused
            with pytest.raises(TimeoutError):
                answers(guest, "10.0.2.2", 8081, timeout_s=0.3)
            wait_until(lambda: guest.refused > before)  # however late the carrier was
            guest.ip("addr", "add", "10.0.2.77/24", "dev", "eth0")
            with pytest.raises(TimeoutError):
                guest.call(
                    lambda: socket.create_connection(("10.0.2.2", 8080), timeout=0.3, source_address=("10.0.2.77", 0))
                )
            assert answers(host, "127.0.0.1", 2222) == b"0.0.0.0:22 to 10.0.2.2"


@pytest.mark.root
def test_published_ports_lead_to_the_guest(host: Namespace, open_link: Open) -> None:
    with Namespace() as outside, connected(host, outside, "192.0.2.1", "192.0.2.2"):
        publishes = ("8080:80", "192.0.2.1:8081:80", "5353:53/udp")
        link = open_link(user_link(publishes=tuple(map(parse_publish, publishes))))
        with LinkGuest(link) as guest, serving(guest, "0.0.0.0", 80):
            assert answers(host, "127.0.0.1", 8080) == b"0.0.0.0:80 to 10.0.2.2"
            assert answers(outside, "192.0.2.1", 8081) == b"0.0.0.0:80 to 192.0.2.2"
            with pytest.raises(ConnectionRefusedError):
                answers(outside, "192.0.2.1", 8080)
            question = guest.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            asker = host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with question, asker:
                question.bind(("0.0.0.0", 53))
                for end in (question, asker):
                    end.settimeout(30)
                asker.sendto(b"who", ("127.0.0.1", 5353))
                text, sender = question.recvfrom(100)
                question.sendto(text + b"?", sender)
                assert asker.recvfrom(100) == (b"who?", ("127.0.0.1", 5353))


@pytest.mark.root
def test_a_subnet_the_host_has_a_route_to_is_left_alone(host: Namespace, open_link: Open) -> None:
    host.ip("route", "add", "10.0.2.128/25", "dev", "lo")
    assert open_link(user_link()).guest.address == "10.0.3.15/24"


@pytest.mark.root
def test_a_published_port_that_is_in_use_is_named_before_anything_starts(host: Namespace, open_link: Open) -> None:
    with serving(host, "127.0.0.1", 8080), pytest.raises(HostError, match=r"127\.0\.0\.1:8080/tcp") as info:
        open_link(user_link(publishes=(parse_publish("8080:80"),)))
    assert "another program has it" in info.value.hint


def test_what_passt_says_when_it_cannot_start_is_passed_on(open_link: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    import kvmlite.host.network.passt as module

    monkeypatch.setattr(module, "MTU", 17)
    with pytest.raises(HostError, match=r"passt ended with status 1: .*MTU"):
        open_link(user_link())


@pytest.mark.root
def test_the_user_is_told_when_passt_dies(open_link: Open, warnings: list[str]) -> None:
    before = set(passt_pids())
    open_link(user_link())
    (pid,) = set(passt_pids()) - before
    os.kill(pid, 9)
    wait_until(lambda: bool(warnings))
    assert warnings == ["net0: passt was killed (SIGKILL); the guest has no network"]


@pytest.mark.root
def test_passt_goes_with_a_process_that_is_killed(host: Namespace) -> None:
    """Also as root, where passt changes its user and the kernel forgets whose child it is."""
    code = (
        "import time\n"
        "from kvmlite.host.loop import DeviceLoop\n"
        "from kvmlite.host.network.link import Surroundings\n"
        "from kvmlite.host.network.passt import UserLink\n"
        "from kvmlite.host.network.publish import parse_publish\n"
        "link = UserLink(mac=bytes(6), publishes=(parse_publish('18099:80'),))\n"
        "opened = link.open(Surroundings(device='net0', queue_pairs=1, loop=DeviceLoop(print), warn=print))\n"
        "print('open', flush=True)\n"
        "time.sleep(100)\n"
    )
    with host.call(lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert host.call(is_listening, 18099)
        process.kill()
    wait_until(lambda: not host.call(is_listening, 18099))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def passt_pids() -> list[int]:
    """Children of ours, through the supervising threads."""
    from support.leaks import children

    return sorted(children())


def test_without_passt_the_error_names_the_package(open_link: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="passt is not installed") as info:
        open_link(user_link())
    assert info.value.hint == "apt-get install passt"


def test_rules_and_published_udp_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="--allow"):
        user_link(rules=(), publishes=(parse_publish("53:53/udp"),))


@pytest.mark.root
def test_it_needs_no_rights_at_all(host: Namespace) -> None:
    """As nobody, without a capability; the host's loopback answers."""
    code = (
        "import sys\n"
        "from kvmlite.host.loop import DeviceLoop\n"
        "from kvmlite.host.network.link import Surroundings\n"
        "from kvmlite.host.network.passt import UserLink\n"
        "loop = DeviceLoop(print); loop.start()\n"
        "link = UserLink(mac=bytes(6)).open(Surroundings(device='net0', queue_pairs=1, loop=loop, warn=print))\n"
        "print(link.guest.gateway)\n"
        "link.close(); loop.stop()\n"
    )
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*nobody, sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60, cwd="/"
        )

    done = host.call(run)
    assert (done.returncode, done.stdout) == (0, "10.0.2.2\n"), done.stderr
