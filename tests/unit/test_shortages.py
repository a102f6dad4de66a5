"""What is made of several things gives back the ones it has when the host has no more of the next."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.fake_back_end import FakeBackEnd
from support.net import FakePort
from support.shortage import Kind, of_anything, of_descriptors, shortages

from kvmlite import Balloon, Console, Disk, Net, Pmem, Vsock
from kvmlite.devices.net import vhost as net_vhost
from kvmlite.devices.net.ports import StreamBackend
from kvmlite.devices.serial_channel import SerialChannel
from kvmlite.devices.vhost_user import VhostUserDevice
from kvmlite.devices.vsock import vhost as vsock_vhost
from kvmlite.host.daemon import Daemon
from kvmlite.host.link_watch import LinkWatch
from kvmlite.host.loop import DeviceLoop
from kvmlite.host.vhost import VhostRing
from kvmlite.memory import GuestMemory
from kvmlite.testing import VirtioRig
from kvmlite.virtio.device import DeviceResources
from kvmlite.virtio.vhost_user.listener import connected_listener

KINDS = pytest.mark.parametrize("kind", [of_descriptors, of_anything])
pytestmark = pytest.mark.usefixtures("mappings")


class PlayedVhost:
    """A vhost device that agrees with everything; one descriptor, as the real one."""

    def __init__(self, path: str) -> None:
        self._fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def features(self) -> int:
        return (1 << 64) - 1

    def set_ring(self, index: int, ring: VhostRing) -> None:
        assert ring.error_fd >= 0

    def agree(self, *_: object) -> None:
        """To whatever it is."""

    set_features = set_memory = set_net_backend = release_ring = set_guest_cid = set_vsock_running = agree

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def bring_up(factory: Callable[[DeviceResources], Any], **rig_options: Any) -> None:
    """Make a device, let a driver start it, end both. What would end a machine, or warn its user, is raised."""
    with VirtioRig(factory, **rig_options) as rig:
        rig.start()
        check(rig)


def check(rig: VirtioRig) -> None:
    for error in rig.errors:
        raise error
    for warning in rig.warnings:
        raise OSError(warning)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return str(path)


@KINDS
@pytest.mark.parametrize(
    "options",
    [
        {"queues": 3, "engine": "io_uring", "iops": 1000},
        {"queues": 3, "engine": "sync", "iops": 1000, "direct": True},
        {"overlay": "discard"},
    ],
)
def test_a_disk(kind: Kind, options: dict[str, Any], image: str) -> None:
    disk = Disk(path=image, **options)
    bring_up(disk.attach)
    for shortage in shortages(kind):
        with shortage:
            bring_up(disk.attach)


@KINDS
def test_a_pmem(kind: Kind, image: str) -> None:
    for shortage in shortages(kind):
        with shortage:
            bring_up(Pmem(path=image, mode="shared").attach)


class PacketPort(FakePort):
    """Packet sockets, as many as there are queue pairs; the other ends are closed: nobody sends."""

    def __init__(self, queue_pairs: int) -> None:
        with ExitStack() as stack:
            ours = []
            for _ in range(queue_pairs):
                pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
                stack.callback(pair[1].close)
                ours.append(stack.enter_context(pair[0]))
            super().__init__("tap", tuple(end.detach() for end in ours))


class PacketBackend:
    """What a card is plugged into that has several queue pairs."""

    def open(self, resources: DeviceResources, queue_pairs: int) -> PacketPort:
        return PacketPort(queue_pairs)


@KINDS
@pytest.mark.parametrize("vhost", ["on", "off"])
def test_a_network_card(kind: Kind, vhost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_vhost, "Vhost", PlayedVhost)
    monkeypatch.setattr(LinkWatch, "_look", lambda watch: None)  # there is no interface
    limits = {} if vhost == "on" else {"packets": 1000}
    card = Net(backend=PacketBackend(), queue_pairs=3, vhost=vhost, **limits)
    bring_up(card.attach)
    for shortage in shortages(kind):
        with shortage:
            bring_up(card.attach)


@KINDS
def test_a_network_card_on_a_stream(kind: Kind) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        card = Net(backend=StreamBackend(ours.fileno()), bandwidth=1 << 30)
        for shortage in shortages(kind):
            with shortage:
                bring_up(card.attach)


@KINDS
@pytest.mark.parametrize("backend", ["user", "vhost"])
def test_a_vsock(kind: Kind, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vsock_vhost, "Vhost", PlayedVhost)
    path = tmp_path / "vsock"
    vsock = Vsock(backend=backend) if backend == "vhost" else Vsock(uds_path=str(path))
    for shortage in shortages(kind):
        with shortage:
            bring_up(vsock.attach)
        assert not path.exists()


@KINDS
def test_a_balloon(kind: Kind) -> None:
    for shortage in shortages(kind):
        with shortage:
            bring_up(Balloon().attach)


@KINDS
def test_a_console_with_somebody_at_it(kind: Kind) -> None:
    for shortage in shortages(kind):
        with shortage, VirtioRig(Console(ports=("one",)).attach) as rig:
            rig.start()
            os.close(rig.device.port("one").connect())  # type: ignore[attr-defined]
            rig.settle()
            check(rig)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_device_of_another_process(in_order: bool) -> None:
    """Its start is the daemon's, which is below; here it is in this process, where only our own calls may fail."""
    for shortage in shortages(of_anything):
        back_end = FakeBackEnd()

        def make(resources: DeviceResources, back_end: FakeBackEnd = back_end) -> VhostUserDevice:
            return VhostUserDevice(
                resources, lambda: (back_end, back_end.client), device_id=26, queue_sizes=(16, 16), features=0,
                config=16, fail=lambda chain: 0, lost_with_it="it was the only one", in_order=in_order,
            )  # fmt: skip

        with shortage:
            bring_up(make, memory_backing="memfd")
        back_end.client.close()
        back_end.end()


@KINDS
@pytest.mark.parametrize(
    "make",
    [
        SerialChannel,
        lambda: DeviceLoop(lambda error: None),
        lambda: GuestMemory(4 << 20, backing="memfd"),
        lambda: GuestMemory(4 << 20, backing="memfd", layout=[(0, 2 << 20), (1 << 32, 2 << 20)]),
    ],
    ids=["serial channel", "loop", "memory", "memory in two parts"],
)
def test_something_else(kind: Kind, make: Callable[[], Any]) -> None:
    for shortage in shortages(kind):
        with shortage:
            thing = make()
            getattr(thing, "stop" if isinstance(thing, DeviceLoop) else "close")()


@KINDS
def test_a_loop_that_runs(kind: Kind) -> None:
    for shortage in shortages(kind):
        with shortage:
            loop = DeviceLoop(lambda error: None)
            try:
                loop.start()
            finally:
                loop.stop()


@KINDS
def test_a_listener_with_its_connection(kind: Kind) -> None:
    for shortage in shortages(kind):
        with shortage:
            for end in connected_listener():
                end.close()


@KINDS
def test_a_helper_process(kind: Kind) -> None:
    for shortage in shortages(kind):
        with shortage:
            Daemon("sleep", ["sleep", "600"]).end()
