"""The network card driven by Linux, over a TAP with the C worker and with the host's kernel (vhost-net)."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmlite import Exited, GuestConfig, LinuxGuest, Net
from kvmlite.devices.net.device import VirtioNet
from kvmlite.devices.net.ports import TapPort
from kvmlite.host.tap import make_tap
from kvmlite.testing import VirtioRig, check_virtio_device
from kvmlite.virtio.device import DeviceResources

from .conftest import STRETCH

pytestmark = pytest.mark.root

NAME = "kvltest0"
HOST, GUEST = "10.77.0.1", "10.77.0.2"
PORT = 7000
PAYLOAD = hashlib.shake_256(b"kvmlite").digest(4 << 20)
DIGEST = hashlib.md5(PAYLOAD).hexdigest()


class TapsBackend:
    """A TAP with an address for the host's end."""

    def open(self, resources: DeviceResources, queue_pairs: int) -> TapPort:
        tap = make_tap(NAME, queue_pairs=queue_pairs)
        ip("addr", "add", f"{HOST}/24", "dev", NAME)
        ip("link", "set", NAME, "up")
        return TapPort(tap)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10 * STRETCH)


@contextmanager
def peer() -> Iterator[list[str]]:
    """A server that sends ``PAYLOAD`` to whoever connects, and takes as much; yields the digests of what it took."""
    digests: list[str] = []

    def serve() -> None:
        with listener:
            connection = listener.accept()[0]
        with connection:
            connection.settimeout(60 * STRETCH)
            sender = threading.Thread(target=connection.sendall, args=(PAYLOAD,))
            sender.start()
            taken = hashlib.md5()
            left = len(PAYLOAD)
            while left and (data := connection.recv(min(left, 1 << 16))):
                taken.update(data)
                left -= len(data)
            sender.join()
            digests.append(taken.hexdigest())

    listener = socket.create_server((HOST, PORT))
    listener.settimeout(60 * STRETCH)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield digests
    finally:
        thread.join()


def sh(guest: LinuxGuest, script: str) -> str:
    """Run a script in the guest, which has to succeed; what it printed."""
    handle = guest.exec(["sh", "-ec", script], stderr="stdout")
    assert handle.wait(60 * STRETCH) == 0, handle.stdout
    return handle.stdout.decode()


@pytest.mark.parametrize(
    ("vhost", "queue_pairs"), [("off", 1), ("off", 2), pytest.param("on", 2, marks=pytest.mark.vhost_net)]
)
def test_a_guest_exchanges_data_with_its_host(kernel: Path, vhost: str, queue_pairs: int) -> None:
    net = Net(backend=TapsBackend(), mac="52:54:00:12:34:56", mtu=1400, queue_pairs=queue_pairs, vhost=vhost)
    config = GuestConfig(kernel=kernel, devices=(net,), features=("net",), vcpu_count=queue_pairs)
    with LinuxGuest(config) as guest:
        guest.start()
        guest.wait_agent()
        card = guest.machine.device(VirtioNet)
        assert card.has_vhost == (vhost == "on")
        sh(guest, f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up")
        facts = sh(guest, "cd /sys/class/net/eth0; cat address mtu carrier; ls queues | wc -l").split()
        assert facts == ["52:54:00:12:34:56", "1400", "1", str(2 * queue_pairs)]
        sh(guest, f"ping -c 3 -i 0.2 -s 1300 {HOST}")
        sh(guest, f"head -c {len(PAYLOAD)} /dev/zero | tr '\\0' k > /data")
        with peer() as digests:
            got = sh(guest, f"nc {HOST} {PORT} < /data | md5sum")
        assert got.split()[0] == DIGEST
        assert digests == [hashlib.md5(b"k" * len(PAYLOAD)).hexdigest()]

        until_carrier = "until [ $(cat /sys/class/net/eth0/carrier) = {} ]; do sleep 0.1; done"
        card.set_link(False)
        sh(guest, until_carrier.format(0))
        card.set_link(True)
        sh(guest, f"{until_carrier.format(1)}; ping -c 3 -i 0.2 {HOST}")

        ip("link", "delete", NAME)
        sh(guest, f"ping -c 1 -W 1 {HOST} || true; {until_carrier.format(0)}")
        assert not card.is_link_up
        report = guest.run_to_end(guest.exec(["true"]))
    assert report.outcome == Exited(code=0)
    assert len(guest.machine.warnings) == 1
    assert "the link is down" in guest.machine.warnings[0]


@pytest.mark.vhost_net
def test_queues_in_the_kernels_hands_conform() -> None:
    net = Net(backend=TapsBackend(), queue_pairs=2, vhost="on")
    check_virtio_device(net.attach)


@pytest.mark.vhost_net
def test_a_reset_takes_the_queues_back_from_the_kernel() -> None:
    net = Net(backend=TapsBackend(), vhost="on")
    with VirtioRig(net.attach, queue_size=64) as rig, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((NAME, 0))
        rig.start()
        for _ in range(20):
            for _ in range(16):
                rig.queues[0].add_chain(writable=[1600])
            rig.kick(0)
            for _ in range(8):
                wire.send(b"\xff" * 6 + bytes(94))
            rig.driver.reset()
            used = rig.queues[0].used_idx
            wire.send(b"\xff" * 6 + bytes(94))
            time.sleep(0.01)
            assert rig.queues[0].used_idx == used
            for queue in rig.queues:
                queue.clear()
            rig.start()
        assert rig.errors == []
        assert rig.warnings == []
