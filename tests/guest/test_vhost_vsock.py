"""vsock served by the host's kernel. Its queues are walked there: what is ours is who may connect, and the end."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from support.command import Command
from support.hostile import HostileChains, check_survives, hostile_chains

from kvmlite import Exited, GuestConfig, HostError, LinuxGuest, Reset, Vsock
from kvmlite.devices.vsock.vhost import VhostVsock
from kvmlite.host.vsock import VsockListener
from kvmlite.testing import VirtioRig, check_virtio_device

from .conftest import STRETCH

pytestmark = pytest.mark.vhost_vsock


@pytest.fixture
def rig() -> Iterator[VirtioRig]:
    with VirtioRig(Vsock(backend="vhost").attach) as made:
        made.start()
        yield made


def test_the_device_conforms() -> None:
    check_virtio_device(Vsock(backend="vhost").attach)


@pytest.mark.parametrize("queue", range(3))
def test_hostile_chains_do_no_harm(rig: VirtioRig, queue: int) -> None:
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(hostile_chains)
    def offer(chains: HostileChains) -> None:
        check_survives(rig, queue, chains)

    offer()


def test_an_address_belongs_to_one_guest_and_is_free_after_it(rig: VirtioRig) -> None:
    assert isinstance(rig.device, VhostVsock)
    cid = rig.device.cid
    assert rig.driver.read_config(0, 8) == cid.to_bytes(8, "little")
    with pytest.raises(HostError, match=f"another guest of this host has the vsock address {cid}") as caught:
        VirtioRig(Vsock(backend="vhost", cid=cid).attach)
    assert caught.value.errno == errno.EADDRINUSE
    rig.device.hang_up()
    rig.loop.run()
    with VirtioRig(Vsock(backend="vhost", cid=cid).attach) as other:
        assert isinstance(other.device, VhostVsock)
        assert other.device.cid == cid


def test_whoever_is_not_the_guest_is_turned_away(rig: VirtioRig) -> None:
    subprocess.run(["modprobe", "vsock_loopback"], check=True)
    assert isinstance(rig.device, VhostVsock)
    accepted: list[int] = []
    listener = VsockListener()
    rig.device.serve(listener, accepted.append)
    with socket.socket(socket.AF_VSOCK) as stranger:
        stranger.settimeout(60)
        stranger.connect((socket.VMADDR_CID_LOCAL if hasattr(socket, "VMADDR_CID_LOCAL") else 1, listener.port))
        rig.loop.run()
        assert stranger.recv(1) == b""
    assert accepted == []
    with pytest.raises(HostError, match=f"cannot listen at vsock port {listener.port}"):
        rig.device.listen(listener.port, accepted.append)


def test_a_port_nobody_listens_at_refuses(rig: VirtioRig) -> None:
    assert isinstance(rig.device, VhostVsock)
    with pytest.raises(HostError, match=r"guest \d+, port 5:"):
        rig.device.connect(5, timeout_s=0.5)


def test_input_and_output_of_a_command_pass_whole(kvmlite: Command, kernel: Path) -> None:
    data = os.urandom(4 << 20)
    options = ("run", "--channel", "vhost-vsock", "--kernel", kernel)
    ended = kvmlite(*options, "--", "sh", "-c", "cat; exit 5", input=data, timeout_s=280)
    assert (ended.code, ended.stderr) == (5, "")
    assert hashlib.sha256(ended.stdout).digest() == hashlib.sha256(data).digest()


def test_two_guests_have_an_address_each(kernel: Path, mappings: None) -> None:
    config = GuestConfig(kernel=kernel, memory_mib=192, channel="vhost-vsock")
    with LinuxGuest(config) as first, LinuxGuest(config) as second:
        for guest in (first, second):
            guest.start()
        for guest in (first, second):
            guest.wait_agent()
        assert first.machine.device(VhostVsock).cid != second.machine.device(VhostVsock).cid
        for guest in (first, second):
            handle = guest.exec(["echo", "hello"])
            assert handle.wait(10 * STRETCH) == 0
            assert handle.stdout == b"hello\n"
            assert guest.run_to_end(guest.exec(["true"])).outcome == Exited(code=0)


def test_what_a_guest_had_sent_before_it_ended_is_delivered(kernel: Path, mappings: None) -> None:
    got = bytearray()

    def take(data: bytes) -> None:
        time.sleep(0.1)  # the guest has ended long before all is read
        got.extend(data)

    with LinuxGuest(GuestConfig(kernel=kernel, channel="vhost-vsock")) as guest:
        guest.start()
        guest.wait_agent()
        script = "head -c 200000 /dev/zero; sleep 5; echo b > /proc/sysrq-trigger; sleep 100"
        report = guest.run_to_end(guest.exec(["sh", "-c", script], stdout=take))
    assert report.outcome == Reset()
    assert got == bytes(200000)
