"""Networks of guests: who reaches whom, who does not, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Command

pytestmark = pytest.mark.root
SERVE = "mkdir /www; echo {text} >/www/name; httpd -p 80 -h /www; echo up; sleep 600"
BRIDGE = "kvltestbr"
# Debian's static busybox cannot look up names, not even addresses: its wget is of no use without an image. The pause
# keeps nc from closing its side first, after which Debian's passt does not pass on that the server closed the other.
GET = """get() { { printf 'GET /%s HTTP/1.0\\r\\n\\r\\n' "$4"; sleep 2; } | nc -w $1 $2 $3 2>&1 | tail -n 1; }
"""


@contextlib.contextmanager
def serving(address: str, port: int, text: str) -> Iterator[None]:
    """A web server on the host that says one thing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{text}\n".encode())

        def log_message(self, *_: object) -> None:
            """Be silent."""

    with http.server.ThreadingHTTPServer((address, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="server")
        thread.start()
        yield
        server.shutdown()
        thread.join()


def processes() -> list[tuple[int, str]]:
    """Id and name of each process of this host that is still there when it is looked at."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found.append((int(path.parent.name), path.read_text().strip()))
    return found


def traces() -> list[str]:
    """What there is of guests' networks on this host."""
    tables = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout.splitlines()
    taps = [name for _, name in socket.if_nameindex() if name.startswith("kvl") and name != BRIDGE]
    daemons = [name for _, name in processes() if name.startswith(("passt", "dnsmasq"))]
    forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()
    return [*tables, *taps, *daemons, *(["forwarding"] if forwarding != "0" else [])]


@pytest.fixture(autouse=True)
def nothing_is_left(kvmlite_home: Path) -> Iterator[None]:
    """No TAP, table, bridge, daemon, setting or note, whatever the test did."""
    before = traces()
    yield
    deadline = time.monotonic() + 30
    while traces() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces() == before
    assert list(kvmlite_home.glob("run/network/*.json")) == []


@contextlib.contextmanager
def started(kvmlite: Command, kernel: Path, script: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A guest that runs until it is killed; entered when its script has printed ``up``."""
    process = kvmlite.start("run", "--kernel", kernel, *options, "--", "sh", "-c", script)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if line != b"up\n":
            process.kill()
            pytest.fail(f"printed {line!r} and {process.communicate()}")
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def nobodys_command() -> Iterator[tuple[Command, Path]]:
    """The command for somebody without a home among ours, and a directory that everybody may write to."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o777)
        yield Command(directory), directory
        shutil.rmtree(directory / "kvmlite-home", ignore_errors=True)


def as_nobody(kernel: Path, directory: Path) -> list[str]:
    """Run what follows as nobody, without a capability; the kernel is at ``directory``/kernel, and /dev/kvm is open to all.

    The mounts are in a namespace of its own.
    """
    (directory / "kernel").mkdir()
    (directory / "dev").mkdir()
    script = (
        f"set -e; mount --bind {kernel} {directory}/kernel; mount -t tmpfs dev {directory}/dev; "
        f"mknod -m 666 {directory}/dev/kvm c 10 232; mount --bind {directory}/dev/kvm /dev/kvm; "
        'exec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all --inh-caps=-all -- "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def test_nobody_reaches_the_hosts_loopback_and_nothing_else(
    nobodys_command: tuple[Command, Path], kernel: Path
) -> None:
    kvmlite, directory = nobodys_command
    script = f"""{GET}
        get 60 10.0.2.2 8080
        get 4 10.0.2.2 8081
        get 60 192.0.2.1 80
        ip route add default via 10.0.2.2 dev eth0
        get 4 192.0.2.1 80
    """
    with serving("127.0.0.1", 8080, "allowed"), serving("127.0.0.1", 8081, "reached"):
        ended = kvmlite(
            "run", "--kernel", directory / "kernel", "--net", "user", "--allow", "127.0.0.1:8080", "--", "sh", "-c", script,
            prefix=as_nobody(kernel, directory), timeout_s=250, cwd="/",
        )  # fmt: skip
    lines = ended.stdout.decode().splitlines()
    assert lines[:1] == ["allowed"], ended
    assert "timed out" in lines[1]
    assert "unreachable" in lines[2]
    assert "timed out" in lines[3]
    assert len(lines) == 4


@pytest.mark.lab
def test_an_image_finds_names_and_the_hosts_loopback(
    kvmlite: Command, kernel: Path, debian: str, resolver: None
) -> None:
    script = """
        . /etc/os-release; echo $ID; ip -br -4 addr show dev eth0
        exec 3<>/dev/tcp/gateway.example/8080; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; tail -n 1 <&3
    """
    with serving("127.0.0.1", 8080, "allowed"):
        options = ("--net", "user", "--allow", "127.0.0.1:8080")
        ended = kvmlite("run", debian, "--kernel", kernel, *options, "--", "bash", "-c", script, timeout_s=250)
    assert (ended.code, ended.stderr) == (0, ""), ended
    assert ended.stdout.decode().split() == ["debian", "eth0", "UP", "10.0.2.15/24", "allowed"]


@pytest.fixture
def resolver() -> Iterator[None]:
    """A resolver on the host's loopback, as the host's own; it knows gateway.example."""
    before = Path("/etc/resolv.conf").read_bytes() if os.path.exists("/etc/resolv.conf") else b""
    command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts"]
    address = ["--listen-address=127.0.0.1", "--bind-interfaces", "--address=/gateway.example/10.0.2.2"]
    with subprocess.Popen([*command, *address]) as process:
        Path("/etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
        yield
        Path("/etc/resolv.conf").write_bytes(before)
        process.terminate()


def test_a_guest_whose_passt_dies_lives_on_without_a_network(kvmlite: Command, kernel: Path) -> None:
    script = "echo up; while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.2; done; echo alone"
    process = kvmlite.start("run", "--kernel", kernel, "--net", "user", "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    (pid,) = [number for number, name in processes() if name.startswith("passt")]
    os.kill(pid, 9)
    ended = kvmlite.finish(process, timeout_s=250)
    assert (ended.code, ended.stdout) == (0, b"alone\n"), ended
    assert "passt was killed (SIGKILL); the guest has no network" in ended.stderr
    assert all("warning: net" in line for line in ended.stderr.splitlines()), ended


def test_guests_on_a_bridge_reach_each_other_unless_their_vlans_differ(kvmlite: Command, kernel: Path) -> None:
    subprocess.run(["ip", "link", "add", BRIDGE, "up", "type", "bridge", "vlan_filtering", "1"], check=True)
    try:
        net = f"bridge={BRIDGE},vlan={{}},address=10.50.0.{{}}/24"
        with started(kvmlite, kernel, SERVE.format(text="neighbour"), "--net", net.format(10, 1)):
            same = kvmlite(
                "run",
                "--kernel",
                kernel,
                "--net",
                net.format(10, 2),
                "--",
                "sh",
                "-c",
                GET + "get 60 10.50.0.1 80 name",
                timeout_s=250,
            )
            assert (same.code, same.stdout) == (0, b"neighbour\n"), same
            other = kvmlite(
                "run",
                "--kernel",
                kernel,
                "--net",
                net.format(20, 3),
                "--",
                "sh",
                "-c",
                GET + "get 12 10.50.0.1 80 name",
                timeout_s=250,
            )
            assert (other.code, other.stderr) == (0, ""), other
            assert b"timed out" in other.stdout or b"No route to host" in other.stdout, other
    finally:
        subprocess.run(["ip", "link", "del", BRIDGE], check=True)


def test_nat_publishes_refuses_answers_dhcp_and_is_swept_after_a_kill(
    kvmlite: Command, kernel: Path, kvmlite_home: Path
) -> None:
    script = f"""{GET}
        for port in 8080 8081; do get 60 10.213.0.1 $port >>/tmp/seen; done
        udhcpc -f -n -q -t 20 -i eth0 -s /bin/true 2>&1 | grep -o '10.213.0.2 obtained' >>/tmp/seen
        mkdir /www; cp /tmp/seen /www/seen; {SERVE.format(text="published").removeprefix("mkdir /www; ")}
    """
    options = ("--net", "nat,dhcp", "--publish", "18080:80", "--allow", "127.0.0.1:8080")
    with serving("0.0.0.0", 8080, "allowed"), serving("0.0.0.0", 8081, "reached"):
        with started(kvmlite, kernel, script, *options):
            assert fetch("http://127.0.0.1:18080/name") == "published\n"
            seen = fetch("http://127.0.0.1:18080/seen").splitlines()
            assert seen[0] == "allowed"
            assert "refused" in seen[1]
            assert seen[2:] == ["10.213.0.2 obtained"]
            assert len([trace for trace in traces() if trace != "forwarding"]) == 3  # table, TAP, dnsmasq
    assert "table ip kvl" in " ".join(traces())  # it was killed
    assert len(list(kvmlite_home.glob("run/network/*.json"))) == 1
    ended = kvmlite("run", "--kernel", kernel, "--net", "nat", "--", "ip", "route", timeout_s=250)
    assert (ended.code, ended.stdout.split()[:5]) == (0, b"default via 10.213.0.1 dev eth0".split()), ended


def fetch(url: str) -> str:
    """A page, by this process."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def test_a_tap_of_ones_own_serves_without_a_word_to_the_host(kvmlite: Command, kernel: Path) -> None:
    subprocess.run(["ip", "tuntap", "add", "tap-mine", "mode", "tap", "user", str(os.getuid())], check=True)
    try:
        for command in ("addr add 10.60.0.1/24 dev tap-mine", "link set tap-mine up"):
            subprocess.run(["ip", *command.split()], check=True)
        with serving("10.60.0.1", 8080, "allowed"), serving("10.60.0.1", 8081, "reached"):
            script = GET + "get 60 10.60.0.1 8080; get 5 10.60.0.1 8081"
            net = ("--net", "tap=tap-mine,address=10.60.0.2/24", "--allow", "10.60.0.1:8080")
            ended = kvmlite("run", "--kernel", kernel, *net, "--", "sh", "-c", script, timeout_s=250)
        lines = ended.stdout.decode().splitlines()
        assert lines[0] == "allowed", ended
        assert "timed out" in lines[1]
    finally:
        subprocess.run(["ip", "link", "del", "tap-mine"], check=True)
