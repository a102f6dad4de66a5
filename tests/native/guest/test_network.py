"""The agent's network set-up, in a network and a mount namespace of its own; under sanitizers."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlite.errors import ConfigError
from kvmlite.guest import build_agent
from kvmlite.guest.network import NetworkSettings, Route, encode_settings, parse_mac

MAC = "52:54:00:12:34:56"
SETTINGS = NetworkSettings(
    mac=MAC,
    mtu=1400,
    addresses=("10.9.0.2/24", "fd00::2/64"),
    routes=(
        Route(destination="0.0.0.0/0", gateway="10.9.0.1"),
        Route(destination="192.0.2.0/24", gateway="10.77.0.1"),
        Route(destination="198.51.100.0/24"),
        Route(destination="::/0", gateway="fe80::1"),
    ),
    resolv_conf="nameserver 10.9.0.1\n",
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = str(tmp_path_factory.mktemp("network") / "network_driver")
    sources = [str(Path(__file__).parent / "network_driver.c"), str(build_agent.SOURCES / "network.c")]
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{build_agent.SOURCES}"]
    subprocess.run(["gcc", *build_agent.STRICT, *flags, *sources, "-o", program], check=True, timeout=60)
    return program


@pytest.fixture
def run(driver: str, tmp_path: Path) -> Run:
    """Run a shell script in new namespaces with an empty /etc and /run; ``configure`` in it takes the payload."""

    def run_script(payload: bytes, script: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "payload").write_bytes(payload)
        prelude = f"""
            set -e; mount -t tmpfs etc /etc; mount -t tmpfs run /run
            ip link add nic0 address {MAC} type veth peer name nic1; ip link set nic1 up
            configure() {{ status=0; {driver} <{tmp_path}/payload || status=$?; }}
        """
        command = ["unshare", "--net", "--mount", "sh", "-c", prelude + script]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)

    return run_script


@pytest.mark.root
def test_link_addresses_routes_and_resolver_are_set(run: Run) -> None:
    done = run(
        encode_settings(SETTINGS),
        "configure; echo $status; ip -o addr show dev nic0 scope global; ip link show nic0; ip route; ip -6 route;"
        "cat /etc/resolv.conf; configure; echo again $status",
    )
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    text = "\n".join(lines)
    assert lines[0] == "0", done.stderr
    assert "inet 10.9.0.2/24 brd 10.9.0.255" in text
    assert "inet6 fd00::2/64" in text
    assert "tentative" not in text
    assert "mtu 1400" in text
    assert ",UP" in text
    assert "default via 10.9.0.1 dev nic0" in text
    assert "192.0.2.0/24 via 10.77.0.1 dev nic0 onlink" in text
    assert "198.51.100.0/24 dev nic0 scope link" in text
    assert "default via fe80::1 dev nic0" in text
    assert lines[-2:] == ["nameserver 10.9.0.1", "again 0"]


@pytest.mark.root
@pytest.mark.parametrize(
    ("prepare", "look"),
    [
        ("ln -s ../run/systemd/resolve/stub.conf /etc/resolv.conf", "cat /run/systemd/resolve/stub.conf"),
        ("ln -s /run/a/b /etc/resolv.conf; mkdir /run/a; ln -s ../c/d /run/a/b", "cat /run/c/d; test -L /run/a/b"),
        ("echo old >/etc/resolv.conf; mount -o remount,ro /etc", "cat /etc/resolv.conf; grep -q resolv /proc/mounts"),
    ],
    ids=["dangling link", "row of links", "read-only root"],
)
def test_the_resolver_file_is_written_where_it_lies(run: Run, prepare: str, look: str) -> None:
    done = run(encode_settings(SETTINGS), f"{prepare}; configure; {look}; exit $status")
    assert (done.returncode, done.stdout) == (0, "nameserver 10.9.0.1\n"), done.stderr


@pytest.mark.root
def test_without_a_text_the_resolver_file_is_left_alone(run: Run) -> None:
    done = run(encode_settings(NetworkSettings(mac=MAC)), "configure; ls -A /etc; exit $status")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.root
def test_a_mac_that_nobody_has_is_enodev(run: Run) -> None:
    done = run(
        encode_settings(NetworkSettings(mac="52:54:00:00:00:01", resolv_conf="x")),
        "configure; ls -A /etc; exit $status",
    )
    assert (done.returncode, done.stdout) == (errno.ENODEV, ""), done.stderr


MALFORMED = {
    "empty": b"",
    "short": bytes(11),
    "address is missing": bytes(8) + b"\1\0\0\0",
    "route is cut short": bytes(10) + b"\1\0" + b"\4" + bytes(32),
    "too many": bytes(8) + b"\xff\xff\xff\xff" + bytes(65536 - 12),
    "family 5": bytes(8) + b"\1\0\0\0" + b"\5" + bytes(17),
    "prefix of 33": bytes(8) + b"\1\0\0\0" + b"\4\x21" + bytes(16),
    "prefix of 129": bytes(10) + b"\1\0" + b"\6\x81" + bytes(32),
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_malformed_settings_are_refused(driver: str, payload: bytes) -> None:
    assert subprocess.run([driver], input=payload, check=False, timeout=30).returncode == errno.EBADMSG


@pytest.mark.parametrize("text", ["", "52:54:00:12:34", "52:54:00:12:34:5g", "52-54-00-12-34-56", "52:54:0:12:34:56"])
def test_what_is_no_mac_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MAC"):
        parse_mac(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"addresses": ("10.0.0.300/24",)},
        {"routes": (Route(destination="10.0.0.1/24"),)},
        {"routes": (Route(destination="10.0.0.0/24", gateway="gw"),)},
        {"addresses": ("10.0.0.1/24",) * 257},
        {"resolv_conf": "x" * 20000},
    ],
)
def test_settings_that_cannot_be_sent_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="network"):
        encode_settings(NetworkSettings(mac=MAC, **settings))
