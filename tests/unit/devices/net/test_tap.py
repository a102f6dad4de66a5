"""Frames between the rings and a TAP, which a packet socket stands for."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from support.hostile import HostileChains, check_survives, hostile_chains
from support.net import ALL_OFFLOADS, FakePort, Plug

from kvmlite import lowlevel
from kvmlite.abi.virtio import VIRTIO_F_VERSION_1, DeviceStatus
from kvmlite.abi.virtio_net import (
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_HDR,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
)
from kvmlite.devices.net.device import VirtioNet
from kvmlite.testing import Used, check_virtio_device
from kvmlite.testing.conformance import ATTACKS
from kvmlite.testing.driver_queue import DriverQueue

V1 = 1 << VIRTIO_F_VERSION_1
MERGEABLE = V1 | 1 << VIRTIO_NET_F_MRG_RXBUF
NO_HEADER = bytes(VIRTIO_NET_HDR.size)
Plugger = Callable[..., Plug]


def frame(size: int, salt: int = 0) -> bytes:
    return bytes((index * 7 + index // 251 + salt) & 0xFF for index in range(size))


def header(num_buffers: int, flags: int = 0, gso_type: int = 0) -> bytes:
    return VIRTIO_NET_HDR.pack(flags, gso_type, 0, 0, 0, 0, num_buffers)


def received(queue: DriverQueue) -> bytes:
    """Everything in the buffers that came back, in order."""
    return b"".join(used.data for used in queue.take_all_used())


def test_the_device_conforms() -> None:
    def attach(resources: lowlevel.DeviceResources) -> object:
        ours, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        hosts.append(host)
        port = FakePort("tap", (ours.detach(),), offloads=ALL_OFFLOADS)
        return VirtioNet(port, resources=resources)

    hosts: list[socket.socket] = []
    check_virtio_device(attach)  # type: ignore[arg-type]
    for host in hosts:
        host.close()


@pytest.mark.parametrize("queue", [0, 1])
@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_on_a_ring_ends_in_needs_reset(plug: Plugger, name: str, queue: int) -> None:
    made = plug()
    ATTACKS[name](made.rig.queues[queue])
    made.rig.kick(queue)
    made.deliver(NO_HEADER + frame(60))
    assert made.rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert made.rig.errors == []


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_go_both_ways(plug: Plugger, indirect: bool, event_idx: bool) -> None:
    made = plug(rig={"indirect": indirect, "event_idx": event_idx})
    for salt in range(40):
        made.tx.set_used_event(made.tx.used_idx)
        head = made.tx.add_chain(readable=[NO_HEADER, frame(14, salt), frame(salt + 1)])
        made.rig.kick(1)
        assert made.host.recv(2000) == NO_HEADER + frame(14, salt) + frame(salt + 1)
        assert made.tx.take_used() == Used(head, 0)
        assert made.rig.take_irq() == 1
        made.rx.set_used_event(made.rx.used_idx)
        head = made.rx.add_chain(writable=[12, 1514])
        made.rig.kick(0)
        made.deliver(NO_HEADER + frame(60 + salt))
        used = made.rx.take_used()
        assert used == Used(head, 72 + salt)
        assert used is not None
        assert used.data == header(1) + frame(60 + salt)
        assert made.rig.take_irq() == 1
    assert made.device.statistics().rx_packets == made.device.statistics().tx_packets == 40


def test_a_frame_is_spread_over_mergeable_buffers_that_appear_at_once(plug: Plugger) -> None:
    made = plug(features=MERGEABLE)
    heads = [made.rx.add_chain(writable=[100, 28]) for _ in range(6)]
    made.rig.kick(0)
    made.deliver(NO_HEADER + frame(500))
    entries = made.rx.take_all_used()
    assert [(used.head_index, used.written) for used in entries] == [(head, 128) for head in heads[:4]]
    assert b"".join(used.data for used in entries) == header(4) + frame(500)


def test_a_frame_of_64_kib_arrives_whole_also_in_small_buffers(plug: Plugger) -> None:
    made = plug(port={"offloads": ALL_OFFLOADS}, rig={"queue_size": 64})
    size = 65536 + 14 - 12
    for _ in range(50):
        made.rx.add_buffers([(0x100000 + 2048 * len(made.rx._chains), 1536, 2)])
    made.rig.kick(0)
    flags = VIRTIO_NET_HDR.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 54, 1460, 34, 16, 0)
    made.deliver(flags + frame(size))
    data = received(made.rx)
    assert data[:10] == flags[:10]
    assert data[10:12] == (43).to_bytes(2, "little")
    assert data[12:] == frame(size)


def test_a_frame_waits_for_the_buffers_it_needs(plug: Plugger) -> None:
    made = plug(features=MERGEABLE)
    made.rx.add_chain(writable=[64])
    made.rig.kick(0)
    made.deliver(NO_HEADER + frame(300))
    made.deliver(NO_HEADER + frame(20, 9))
    assert made.rx.take_all_used() == []
    for _ in range(4):
        made.rx.add_chain(writable=[64])
        made.rig.kick(0)
    assert received(made.rx) == header(5) + frame(300)
    made.rx.add_chain(writable=[64])
    made.rig.kick(0)
    assert received(made.rx) == header(1) + frame(20, 9)


def test_buffers_of_one_byte_hold_a_frame_too(plug: Plugger) -> None:
    made = plug(features=MERGEABLE, rig={"queue_size": 128})
    for _ in range(100):
        made.rx.add_chain(writable=[1])
    made.rig.kick(0)
    made.deliver(NO_HEADER + frame(60))
    assert received(made.rx) == header(72) + frame(60)


def test_a_frame_no_ring_can_hold_is_dropped(plug: Plugger) -> None:
    made = plug(features=MERGEABLE)
    for _ in range(16):
        made.rx.add_chain(writable=[16])
    made.rig.kick(0)
    made.deliver(NO_HEADER + frame(300))
    made.deliver(NO_HEADER + frame(60))
    assert received(made.rx) == header(5) + frame(60)
    assert made.device.statistics().rx_dropped == 1


def test_without_mergeable_buffers_a_frame_has_one_chain_or_none(plug: Plugger) -> None:
    made = plug(features=V1)
    for _ in range(2):
        made.rx.add_chain(writable=[12, 100])
    made.rig.kick(0)
    made.deliver(NO_HEADER + frame(200))
    made.deliver(NO_HEADER + frame(100))
    assert received(made.rx) == header(1) + frame(100)
    assert made.device.statistics().rx_dropped == 1


@pytest.mark.parametrize("has_csum", [False, True])
def test_flags_of_a_header_are_shown_to_those_who_asked(plug: Plugger, has_csum: bool) -> None:
    features = V1 | (1 << VIRTIO_NET_F_GUEST_CSUM if has_csum else 0)
    made = plug(features=features, port={"offloads": ALL_OFFLOADS})
    made.rx.add_chain(writable=[2000])
    made.rig.kick(0)
    made.deliver(header(0, flags=2) + frame(60))
    assert received(made.rx)[0] == (2 if has_csum else 0)


def test_receive_buffers_that_cannot_be_written_are_a_fault(plug: Plugger) -> None:
    made = plug()
    made.rx.add_chain(readable=[b"please"], writable=[2000])
    made.rig.kick(0)
    assert made.rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert "receive buffer" in made.rig.transport.statistics().last_fault
    made.rig.restart()
    assert made.rig.driver.status == 15


@pytest.mark.parametrize("parts", [[b""], [b"short"], [NO_HEADER + bytes(13)], [NO_HEADER, bytes(14), bytes(65575)]])
def test_what_is_no_frame_is_not_sent(plug: Plugger, parts: list[bytes]) -> None:
    made = plug()
    made.tx.add_chain(readable=parts)
    made.tx.add_chain(readable=[NO_HEADER + frame(60)])
    made.rig.kick(1)
    assert made.host.recv(2000) == NO_HEADER + frame(60)
    assert [used.written for used in made.tx.take_all_used()] == [0, 0]
    assert made.device.statistics().tx_dropped == 1


def test_more_refused_frames_than_one_visit_looks_at_are_all_given_back(plug: Plugger) -> None:
    made = plug(rig={"queue_size": 256})
    for _ in range(200):
        made.tx.add_chain(readable=[b"short"])
    made.tx.add_chain(readable=[NO_HEADER + frame(60)])
    made.rig.kick(1)
    assert made.host.recv(2000) == NO_HEADER + frame(60)
    made.rig.settle()
    assert len(made.tx.take_all_used()) == 201
    assert made.device.statistics().tx_dropped == 200


def test_a_full_host_makes_the_queue_wait(plug: Plugger) -> None:
    made = plug(rig={"queue_size": 256})
    made.host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    large = frame(1500)
    gpa = made.tx.allocate(NO_HEADER + large)
    for _ in range(256):
        made.tx.add_buffers([(gpa, 1512, 0)])
    made.rig.kick(1)
    done = len(made.tx.take_all_used())
    assert 0 < done < 256
    for _ in range(256):
        assert made.host.recv(2000) == NO_HEADER + large
    made.rig.settle()
    assert done + len(made.tx.take_all_used()) == 256


def test_a_batch_raises_one_interrupt(plug: Plugger) -> None:
    made = plug()
    for _ in range(8):
        made.tx.add_chain(readable=[NO_HEADER + frame(60)])
    made.rig.take_irq()
    made.rig.kick(1)
    assert made.tx.used_idx == 8
    assert made.rig.take_irq() == 1


def test_a_link_that_is_down_drops_frames_and_says_so(plug: Plugger) -> None:
    made = plug()
    made.rx.add_chain(writable=[2000])
    made.rig.kick(0)
    assert made.rig.driver.read_config(6, 2) == b"\1\0"
    made.device.set_link(False)
    assert made.rig.driver.read_config(6, 2) == b"\0\0"
    assert made.rig.take_irq() >= 1
    made.tx.add_chain(readable=[NO_HEADER + frame(60)])
    made.rig.kick(1)
    made.deliver(NO_HEADER + frame(70))
    assert made.tx.take_used() == Used(0, 0)
    made.device.set_link(True)
    made.tx.add_chain(readable=[NO_HEADER + frame(80)])
    made.rig.kick(1)
    made.deliver(NO_HEADER + frame(90))
    assert made.host.recv(2000) == NO_HEADER + frame(80)
    assert received(made.rx) == header(1) + frame(90)
    assert made.rig.warnings == []


def test_a_host_that_goes_away_takes_the_link_down_and_nothing_else(plug: Plugger) -> None:
    made = plug()
    made.rx.add_chain(writable=[2000])
    made.rig.kick(0)
    made.host.close()
    made.rig.settle()
    assert made.rig.warnings == ["device0: the link is down: its peer has closed the connection"]
    assert not made.device.is_link_up
    for _ in range(20):
        made.tx.add_chain(readable=[NO_HEADER + frame(60)])
        made.rig.kick(1)
        assert made.tx.take_used() is not None
    made.device.set_link(True)
    assert not made.device.is_link_up
    made.rig.restart()
    made.tx.add_chain(readable=[NO_HEADER + frame(60)])
    made.rig.kick(1)
    assert made.tx.take_used() is not None
    assert len(made.rig.warnings) == 1
    assert made.rig.errors == []
    assert made.rig.driver.status == 15


def test_a_reset_under_traffic_stops_all_writes(plug: Plugger) -> None:
    made = plug(rig={"queue_size": 64})
    for salt in range(30):
        for _ in range(8):
            made.rx.add_chain(writable=[256])
        made.rig.kick(0)
        for _ in range(4):
            made.host.send(NO_HEADER + frame(60, salt))
        made.rig.driver.reset()
        idle = made.rx.used_idx
        made.host.send(NO_HEADER + frame(60, salt))
        assert made.rx.used_idx == idle
        for queue in made.rig.queues:
            queue.clear()
        made.rig.start()
    made.rx.add_chain(writable=[256])
    made.rig.kick(0)
    assert received(made.rx)[:12] == header(1)
    assert made.rig.errors == []


@pytest.mark.parametrize("framing", ["tap", "stream"])
@pytest.mark.parametrize("queue", [0, 1, 2])
def test_no_chain_a_driver_could_think_of_does_harm(plug: Plugger, framing: str, queue: int) -> None:
    made = plug(framing, port={"offloads": ALL_OFFLOADS if framing == "tap" else 0})
    made.host.setblocking(False)

    @settings(max_examples=40)
    @given(hostile_chains)
    def survives(chains: HostileChains) -> None:
        for _ in range(4):
            try:
                made.host.send(NO_HEADER + frame(200) if framing == "tap" else b"\0\0\0\xc8" + frame(200))
                made.host.recv(1 << 20)
            except BlockingIOError:
                pass
        check_survives(made.rig, queue, chains)

    survives()
