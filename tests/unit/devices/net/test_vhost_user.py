"""A network card that the program at its other end serves itself."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fake_back_end import FakeBackEnd

from kvmlite.abi.virtio import VIRTIO_ID_NET
from kvmlite.abi.virtio_net import (
    VIRTIO_NET_CONFIG,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
)
from kvmlite.devices import vhost_user
from kvmlite.devices.net import Net
from kvmlite.devices.net.features import bits
from kvmlite.devices.net.link import LinkBackend
from kvmlite.devices.net.vhost_user import RX_QUEUE
from kvmlite.host.network import passt
from kvmlite.host.network.egress import EgressRule
from kvmlite.host.network.link import GuestAddresses, OpenLink, Surroundings
from kvmlite.host.network.nat import NatLink
from kvmlite.host.network.passt import UserLink
from kvmlite.testing import VirtioRig

PATIENCE_S = 30.0
MAC = bytes.fromhex("525400123456")
VERSION_1 = 1 << 32
# As those of passt: neither EVENT_IDX nor indirect descriptors.
OFFERED = VERSION_1 | 1 << 30 | 1 << 26 | bits(VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_CTRL_VQ)
OWN = bits(VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS)
TX_QUEUE = 1


class FakeLink:
    """A link to a back end that serves the card, if it may."""

    serves_card = True

    def __init__(self) -> None:
        self.started: list[FakeBackEnd] = []
        self.surroundings: Surroundings | None = None

    @property
    def back_end(self) -> FakeBackEnd:
        return self.started[0]

    def start(self) -> tuple[Any, socket.socket]:
        self.started.append(FakeBackEnd(features=OFFERED))
        return self.back_end, self.back_end.client

    def open(self, surroundings: Surroundings) -> OpenLink:
        self.surroundings = surroundings
        return OpenLink(guest=GuestAddresses(address="10.0.2.15/24"), back_end=self.start, mtu=9000)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLink]:
    monkeypatch.setattr(vhost_user, "_LAST_WORDS_S", 0.1)
    link = FakeLink()
    yield link
    assert not [back_end for back_end in link.started if back_end.is_running]


@pytest.fixture
def rig(link: FakeLink) -> Iterator[VirtioRig]:
    card = Net(backend=LinkBackend(link, mac=MAC))
    with VirtioRig(card.attach, memory_backing="memfd", event_idx=False, indirect=False) as rig:
        yield rig
        assert rig.errors == []


def wait_for(rig: VirtioRig, what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, f"warnings: {rig.warnings}"
        rig.loop.run()
        time.sleep(0.001)


def config(rig: VirtioRig) -> tuple[Any, ...]:
    return VIRTIO_NET_CONFIG.unpack(rig.driver.read_config(0, VIRTIO_NET_CONFIG.size))


def test_the_card_is_ours_and_the_queues_are_the_back_ends(rig: VirtioRig, link: FakeLink) -> None:
    assert rig.device.device_id == VIRTIO_ID_NET
    assert rig.device.queue_sizes == (256, 256)
    assert config(rig) == (MAC, VIRTIO_NET_S_LINK_UP, 1, 9000)
    assert rig.driver.read_features() == VERSION_1 | OWN | bits(VIRTIO_NET_F_MRG_RXBUF)
    rig.start()
    rig.queues[TX_QUEUE].add_chain(readable=[bytes(80)])
    rig.driver.notify(TX_QUEUE)
    wait_for(rig, rig.queues[TX_QUEUE].take_used)
    passed_on = VERSION_1 | 1 << 30 | bits(VIRTIO_NET_F_MRG_RXBUF)
    assert link.back_end.driver_features == passed_on, "it has not offered the others"
    assert link.surroundings is not None
    assert link.surroundings.serves_card
    assert rig.warnings == []


def test_when_the_back_end_dies_the_carrier_is_gone_and_frames_are_dropped(rig: VirtioRig, link: FakeLink) -> None:
    link.back_end.serves = False
    rig.start()
    rig.driver.take_interrupt()
    rig.queues[RX_QUEUE].add_chain(writable=[2000])
    rig.queues[TX_QUEUE].add_chain(readable=[bytes(80)])
    link.back_end.die()
    wait_for(rig, rig.queues[TX_QUEUE].take_used)
    wait_for(rig, lambda: rig.warnings)
    assert config(rig) == (MAC, 0, 1, 9000)
    assert rig.driver.take_interrupt() & 2, "the driver is told of its configuration"
    rig.queues[TX_QUEUE].add_chain(readable=[bytes(80)])
    rig.driver.notify(TX_QUEUE)
    wait_for(rig, rig.queues[TX_QUEUE].take_used)
    rig.driver.notify(RX_QUEUE)
    rig.settle()
    assert rig.queues[RX_QUEUE].take_used() is None, "an empty frame came in"
    assert rig.warnings == [
        "device0: fake-daemon was killed (SIGKILL): the guest's connections were lost with it; "
        "the guest has no network from now on"
    ]


def test_a_card_of_its_own_address_and_size_keeps_them(link: FakeLink) -> None:
    card = Net(backend=LinkBackend(link, mac=MAC), mac="52:54:00:00:00:01", mtu=1400)
    with VirtioRig(card.attach, memory_backing="memfd") as rig:
        assert config(rig) == (bytes.fromhex("525400000001"), VIRTIO_NET_S_LINK_UP, 1, 1400)


@pytest.mark.parametrize(
    "options", [{"vhost": "off"}, {"vhost": "on"}, {"bandwidth": 1000}, {"packets": 10}, {"queue_pairs": 2}]
)
def test_what_only_we_can_do_keeps_the_card_here(link: FakeLink, options: dict[str, Any]) -> None:
    assert Net(backend=LinkBackend(link)).needs_shared_memory
    assert not Net(backend=LinkBackend(link), **options).needs_shared_memory


def test_a_backend_that_knows_nothing_of_it_is_opened() -> None:
    class Plain:
        def open(self, resources: object, queue_pairs: int) -> Any:
            raise NotImplementedError

    assert not Net(backend=Plain()).needs_shared_memory


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('echo \'{ "type": "net" }\' >&2', True),
        ('echo \'{ "type": "net" }\'', True),
        ("echo 'unrecognized option' >&2; exit 1", False),
        ('echo \'{ "type": "net" }\'; exit 1', False),
        ("echo usage", False),
        (None, False),
    ],
)
def test_passt_is_asked_what_it_can_do(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: bool
) -> None:
    program = tmp_path / "passt"
    known = f"# has vhost-user\n{script}" if script else "touch $0.asked"
    program.write_text(f"#!/bin/sh\n{known}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert UserLink(mac=MAC).serves_card is expected
    assert not (tmp_path / "passt.asked").exists()
    assert not UserLink(mac=MAC, rules=(EgressRule(network="10.0.0.0/8"),)).serves_card, "nobody would ask the rules"
    assert not NatLink().serves_card


def test_passt_is_started_on_a_connection_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "passt"
    program.write_text('#!/bin/sh\necho "$@" >"$0.arguments"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    around = Surroundings(device="net0", queue_pairs=1, loop=None, warn=print, serves_card=True)  # type: ignore[arg-type]
    opened = UserLink(mac=MAC).open(around)
    assert (opened.guest.address, opened.mtu) == ("10.0.2.15/24", passt.MTU)
    assert opened.back_end is not None
    daemon, connection = opened.back_end()
    with connection:
        assert daemon.wait(PATIENCE_S)
        daemon.end()
    arguments = (tmp_path / "passt.arguments").read_text().split()
    assert arguments[-1] == "--vhost-user"
    assert arguments[:3] == ["--foreground", "--quiet", "--fd"]
