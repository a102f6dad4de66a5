"""The card on real TAP interfaces, in a network namespace of the test's own."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Callable

import pytest
from support.namespace import in_network_namespace

from kvmlite import Net
from kvmlite.abi.virtio_net import (
    VIRTIO_NET_HDR,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
)
from kvmlite.devices.net.ports import TapBackend, TapPort
from kvmlite.host.tap import Tap, make_tap
from kvmlite.testing import VirtioRig
from kvmlite.virtio.device import DeviceResources

pytestmark = pytest.mark.root

NAME = "kvltest0"
ETH_P_ALL, ETH_P_TEST = 3, 0x88B5  # the latter is for experiments
NO_HEADER = bytes(VIRTIO_NET_HDR.size)


class TapsBackend:
    """A TAP with as many queues as the card wants."""

    def open(self, resources: DeviceResources, queue_pairs: int) -> TapPort:
        return TapPort(make_tap(NAME, queue_pairs=queue_pairs))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def bring_up() -> socket.socket:
    """The host's end: no IPv6 chatter, and a socket for raw frames."""
    subprocess.run(["sysctl", "-qw", f"net.ipv6.conf.{NAME}.disable_ipv6=1"], check=True, timeout=30)
    ip("link", "set", NAME, "up")
    host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    host.bind((NAME, 0))
    host.settimeout(30)
    return host


def ethernet(payload: bytes, kind: int = ETH_P_TEST) -> bytes:
    return b"\xff" * 6 + b"\x02\0\0\0\0\x01" + struct.pack(">H", kind) + payload


def with_card(body: Callable[[VirtioRig, socket.socket], None], queue_pairs: int = 1) -> None:
    def run() -> None:
        net = Net(backend=TapsBackend(), queue_pairs=queue_pairs, vhost="off")
        with VirtioRig(net.attach, queue_size=64) as rig:
            rig.start()
            with bring_up() as host:
                body(rig, host)
            assert rig.errors == []

    in_network_namespace(run)


def test_frames_cross_a_tap_both_ways() -> None:
    def body(rig: VirtioRig, host: socket.socket) -> None:
        rx, tx = rig.queues[:2]
        for size in (46, 1000, 1486):
            tx.add_chain(readable=[NO_HEADER, ethernet(bytes([size & 255]) * size)])
            rig.kick(1)
            assert host.recv(65536) == ethernet(bytes([size & 255]) * size)
            for _ in range(4):
                rx.add_chain(writable=[700])
            rig.kick(0)
            host.send(ethernet(bytes([7]) * size))
            wait_for(lambda: rx.used_idx != rx._seen_used)
            rig.settle()
            data = b"".join(used.data for used in rx.take_all_used())
            assert data[12:] == ethernet(bytes([7]) * size)

    with_card(body)


def test_a_segmented_frame_of_64_kib_reaches_the_host_whole() -> None:
    payload = bytes(range(256)) * 240
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 0, 0x50, 0x10, 0xFFFF, 0, 0) + payload
    address = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0, *address)
    vnet = VIRTIO_NET_HDR.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 54, 1448, 34, 16, 0)

    def body(rig: VirtioRig, host: socket.socket) -> None:
        rig.queues[1].add_chain(readable=[vnet, ethernet(header + tcp, 0x0800)])
        rig.kick(1)
        assert host.recv(70000)[54:] == payload

    with_card(body)


def test_a_header_the_kernel_refuses_drops_the_frame_only() -> None:
    def body(rig: VirtioRig, host: socket.socket) -> None:
        broken = VIRTIO_NET_HDR.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, 0xFF, 0xFFFF, 0, 0xFFFF, 0xFFFF, 0xFFFF)
        rig.queues[1].add_chain(readable=[broken, ethernet(bytes(60))])
        rig.queues[1].add_chain(readable=[NO_HEADER, ethernet(bytes([1]) * 60)])
        rig.kick(1)
        assert host.recv(2000) == ethernet(bytes([1]) * 60)
        assert len(rig.queues[1].take_all_used()) == 2
        assert rig.device.statistics().tx_dropped == 1  # type: ignore[attr-defined]
        assert rig.warnings == []

    with_card(body)


def test_queues_are_attached_as_the_driver_asks() -> None:
    def body(rig: VirtioRig, host: socket.socket) -> None:
        control = rig.queues[-1]
        for count in (4, 1, 3):
            control.add_chain(readable=[b"\x04\x00", count.to_bytes(2, "little")], writable=[1])
            rig.kick(len(rig.queues) - 1)
            used = control.take_used()
            assert used is not None
            assert used.data == b"\0"
            for index in range(count):
                rig.queues[2 * index + 1].add_chain(readable=[NO_HEADER, ethernet(bytes([index]) * 60)])
                rig.kick(2 * index + 1)
                assert host.recv(2000)[-1] == index
        assert rig.warnings == []

    with_card(body, queue_pairs=4)


def test_an_interface_that_is_down_drops_frames_and_comes_back() -> None:
    def body(rig: VirtioRig, host: socket.socket) -> None:
        ip("link", "set", NAME, "down")
        rig.queues[1].add_chain(readable=[NO_HEADER, ethernet(bytes(60))])
        rig.kick(1)
        assert rig.queues[1].take_used() is not None
        ip("link", "set", NAME, "up")
        with bring_up() as again:
            rig.queues[1].add_chain(readable=[NO_HEADER, ethernet(bytes([2]) * 60)])
            rig.kick(1)
            assert again.recv(2000) == ethernet(bytes([2]) * 60)
        assert rig.warnings == []

    with_card(body)


@pytest.mark.parametrize("has_buffers", [False, True])
def test_a_removed_interface_takes_the_link_down_with_one_warning(has_buffers: bool) -> None:
    def body(rig: VirtioRig, host: socket.socket) -> None:
        if has_buffers:
            rig.queues[0].add_chain(writable=[2000])
            rig.kick(0)
        ip("link", "delete", NAME)
        for _ in range(3):
            rig.queues[1].add_chain(readable=[NO_HEADER, ethernet(bytes(60))])
            rig.kick(1)
        wait_for(lambda: bool(rig.warnings))
        assert rig.warnings == ["device0: the link is down: the host's end failed: File descriptor in bad state"]
        assert len(rig.queues[1].take_all_used()) == 3
        assert rig.driver.read_config(6, 2) == b"\0\0"
        rig.restart()
        assert rig.driver.status == 15
        assert len(rig.warnings) == 1

    with_card(body)


def test_a_descriptor_of_somebody_elses_tap_is_enough() -> None:
    def run() -> None:
        tap: Tap = make_tap(NAME)
        with VirtioRig(Net(backend=TapBackend(tap.fds[0]), vhost="off").attach) as rig:
            rig.start()
            tap.close()
            with bring_up() as host:
                rig.queues[1].add_chain(readable=[NO_HEADER, ethernet(bytes(60))])
                rig.kick(1)
                assert host.recv(2000) == ethernet(bytes(60))

    in_network_namespace(run)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
