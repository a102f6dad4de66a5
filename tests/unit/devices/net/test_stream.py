"""Frames between the rings and a stream socket, each behind its length."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from struct import Struct

import pytest
from support.net import Plug

from kvmlite import Net
from kvmlite.abi.virtio_net import VIRTIO_NET_HDR
from kvmlite.devices.net.ports import StreamBackend, StreamPort
from kvmlite.testing import VirtioRig

LENGTH = Struct(">I")
NO_HEADER = bytes(VIRTIO_NET_HDR.size)
ONE_BUFFER = VIRTIO_NET_HDR.pack(0, 0, 0, 0, 0, 0, 1)
SYN, ACK = 2, 16
Plugger = Callable[..., Plug]


def frame(size: int, salt: int = 0) -> bytes:
    return bytes((index * 7 + index // 251 + salt) & 0xFF for index in range(size))


def framed(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


def segment(flags: int, data: bytes = b"") -> bytes:
    """A frame with a TCP segment; what nobody looks at is zero."""
    ip = bytes((0x45, 0)) + (40 + len(data)).to_bytes(2, "big") + bytes(5) + bytes((6,)) + bytes(10)
    return bytes(12) + b"\x08\x00" + ip + bytes(12) + bytes((0x50, flags)) + bytes(6) + data


def read_frames(host: socket.socket, count: int) -> list[bytes]:
    def read(size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += host.recv(size - len(data))
        return data

    return [read(LENGTH.unpack(read(4))[0]) for _ in range(count)]


def test_no_offload_is_offered(plug: Plugger) -> None:
    features = plug("stream").rig.driver.read_features()
    assert features & (1 << 0 | 1 << 1 | 1 << 7 | 1 << 11 | 1 << 17) == 0
    assert features & (1 << 5 | 1 << 15 | 1 << 16) == 1 << 5 | 1 << 15 | 1 << 16


@pytest.mark.parametrize(("features", "flags"), [(1 << 1, 2), (0, 0)])
def test_a_driver_that_wants_to_know_is_told_of_checksums_made_here(features: int, flags: int) -> None:
    ours, theirs = socket.socketpair()

    class Backend:
        def open(self, resources: object, queue_pairs: int) -> StreamPort:
            return StreamPort(ours.detach(), has_valid_sums=True)

    with theirs, VirtioRig(Net(backend=Backend()).attach) as rig:
        assert rig.driver.read_features() & (1 << 0 | 1 << 1 | 1 << 17) == 1 << 1, "GUEST_CSUM alone"
        rig.start(1 << 32 | 1 << 15 | features)
        rig.queues[0].add_chain(writable=[200])
        rig.kick(0)
        theirs.sendall(framed(frame(60)))
        rig.settle()
        used = rig.queues[0].take_used()
        assert used is not None
        assert used.data == VIRTIO_NET_HDR.pack(flags, 0, 0, 0, 0, 0, 1) + frame(60)


def test_frames_go_both_ways_in_batches(plug: Plugger) -> None:
    made = plug("stream", rig={"queue_size": 64})
    for salt in range(20):
        sent = [frame(14 + 37 * index, salt) for index in range(20)]
        for data in sent:
            made.tx.add_chain(readable=[NO_HEADER + data[:7], data[7:]])
        made.rig.kick(1)
        assert read_frames(made.host, 20) == sent
        assert len(made.tx.take_all_used()) == 20
        for _ in range(20):
            made.rx.add_chain(writable=[12, 800])
        made.rig.kick(0)
        made.deliver(b"".join(map(framed, sent)))
        assert [used.data for used in made.rx.take_all_used()] == [ONE_BUFFER + data for data in sent]
    assert made.device.statistics().rx_packets == made.device.statistics().tx_packets == 400


def test_a_frame_that_arrives_byte_by_byte_is_whole(plug: Plugger) -> None:
    made = plug("stream")
    made.rx.add_chain(writable=[200])
    made.rig.kick(0)
    for byte in framed(frame(60)):
        assert made.rx.used_idx == 0
        made.deliver(bytes([byte]))
    used = made.rx.take_used()
    assert used is not None
    assert used.data == ONE_BUFFER + frame(60)


@pytest.mark.parametrize(
    "frames",
    [
        [segment(ACK)],
        [segment(ACK)] * 5,
        [segment(ACK), segment(ACK, b"data")],
        [segment(SYN), segment(ACK)],
        [segment(SYN | ACK)],
        [frame(60)],
    ],
)
def test_the_driver_is_told_of_all_frames_in_the_end(plug: Plugger, frames: list[bytes]) -> None:
    made = plug("stream")
    for _ in range(8):
        made.rx.add_chain(writable=[200])
    made.rig.kick(0)
    made.rig.take_irq()
    for data in frames:
        made.host.sendall(framed(data))
    made.rig.settle()
    assert [used.data for used in made.rx.take_all_used()] == [ONE_BUFFER + data for data in frames]
    assert 1 <= made.rig.take_irq() <= len(frames)


def test_acknowledgements_that_use_up_the_buffers_do_not_wait(plug: Plugger) -> None:
    made = plug("stream")
    made.rx.add_chain(writable=[200])
    made.rig.kick(0)
    made.rig.take_irq()
    made.deliver(framed(segment(ACK)) * 2)
    assert made.rx.take_used() is not None
    assert made.rig.take_irq() == 1
    made.rx.add_chain(writable=[200])
    made.rig.kick(0)
    assert made.rx.take_used() is not None


def test_a_reset_while_an_acknowledgement_waits_is_clean(plug: Plugger) -> None:
    made = plug("stream")
    for _ in range(20):
        made.rx.add_chain(writable=[200])
        made.rig.kick(0)
        made.host.sendall(framed(segment(ACK)))
        deadline = time.monotonic() + 30
        while made.rx.used_idx == 0:
            assert time.monotonic() < deadline
        made.rig.restart()
    made.rx.add_chain(writable=[200])
    made.rig.kick(0)
    made.deliver(framed(frame(60)))
    used = made.rx.take_used()
    assert used is not None
    assert used.data == ONE_BUFFER + frame(60)
    assert made.rig.errors == []


def test_frames_wait_for_buffers_and_come_in_order(plug: Plugger) -> None:
    made = plug("stream", rig={"queue_size": 64})
    sent = [frame(1500, salt) for salt in range(300)]
    pending = b"".join(map(framed, sent))
    got: list[bytes] = []
    made.host.setblocking(False)
    while len(got) < len(sent):
        if pending:
            try:
                pending = pending[made.host.send(pending) :]
            except BlockingIOError:
                pass
        for _ in range(7):
            made.rx.add_chain(writable=[1600])
        made.rig.kick(0)
        got += [used.data[12:] for used in made.rx.take_all_used()]
    assert got == sent


def test_large_frames_pass_a_peer_that_reads_slowly(plug: Plugger) -> None:
    made = plug("stream", rig={"queue_size": 64})
    gpa = 0x200000
    data = frame(65535)
    made.rig.memory.write(gpa, NO_HEADER + data)
    count = 30
    for _ in range(count):
        made.tx.add_buffers([(gpa, 30000, 0), (gpa + 30000, 12 + 65535 - 30000, 0)])
    made.rig.kick(1)
    assert made.tx.used_idx < count
    assert read_frames(made.host, count) == [data] * count
    made.rig.settle()
    assert len(made.tx.take_all_used()) == count


@pytest.mark.parametrize("length", [0, 65589, 1 << 20, 0xFFFFFFFF])
def test_a_length_no_frame_has_takes_the_link_down(plug: Plugger, length: int) -> None:
    made = plug("stream")
    made.rx.add_chain(writable=[200])
    made.rx.add_chain(writable=[200])
    made.rig.kick(0)
    made.deliver(framed(frame(60)) + LENGTH.pack(length) + frame(100))
    assert made.rx.used_idx == 1
    assert made.rig.warnings == [
        f"device0: the link is down: its peer announced a frame of {length} bytes, which breaks the protocol"
    ]
    assert not made.device.is_link_up
    made.tx.add_chain(readable=[NO_HEADER + frame(60)])
    made.rig.kick(1)
    assert made.tx.take_used() is not None
    assert made.rig.errors == []


def test_runts_are_dropped(plug: Plugger) -> None:
    made = plug("stream")
    made.rx.add_chain(writable=[200])
    made.rig.kick(0)
    made.deliver(framed(frame(13)) + framed(frame(14)))
    used = made.rx.take_used()
    assert used is not None
    assert used.data == ONE_BUFFER + frame(14)
    assert made.device.statistics().rx_dropped == 1


def test_a_peer_that_closes_while_frames_wait_takes_the_link_down(plug: Plugger) -> None:
    made = plug("stream", rig={"queue_size": 64})
    gpa = 0x200000
    for _ in range(60):
        made.tx.add_buffers([(gpa, 65000, 0)])
    made.rig.kick(1)
    made.host.close()
    made.rig.settle()
    assert len(made.rig.warnings) == 1
    assert "the link is down: " in made.rig.warnings[0]
    assert made.tx.used_idx == 60
    assert made.rig.errors == []


def test_a_socket_stays_its_owners() -> None:
    ours, host = socket.socketpair()
    with ours, host:
        with VirtioRig(Net(backend=StreamBackend(ours.fileno(), mtu=65520)).attach) as rig:
            rig.start()
            assert rig.driver.read_config(10, 2) == (65520).to_bytes(2, "little")
            rig.queues[1].add_chain(readable=[NO_HEADER + frame(60)])
            rig.kick(1)
            assert read_frames(host, 1) == [frame(60)]
        ours.sendall(b"still open")
        assert host.recv(100) == b"still open"
