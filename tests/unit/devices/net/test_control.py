"""The spec, configuration space, features, and the control queue."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.net import ALL_OFFLOADS, Plug

from kvmlite import Net
from kvmlite.abi import virtio_net as abi
from kvmlite.abi.tun import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6
from kvmlite.abi.virtio import VIRTIO_F_VERSION_1, DeviceStatus
from kvmlite.devices.net import features as net_features
from kvmlite.errors import ConfigError
from kvmlite.host import vhost
from kvmlite.testing.conformance import ATTACKS

V1 = 1 << VIRTIO_F_VERSION_1
NO_HEADER = bytes(abi.VIRTIO_NET_HDR.size)
HEADS = [bytes((kind, number)) for kind in range(7) for number in range(3)]
OK, ERR = b"\x00", b"\x01"
Plugger = Callable[..., Plug]


def bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def command(made: Plug, kind: int, number: int, data: bytes = b"", queue: int = -1) -> bytes:
    """One command, alone; its answer."""
    ring = made.rig.queues[queue]
    ring.add_chain(readable=[bytes([kind, number]), data], writable=[1])
    made.rig.kick(len(made.rig.queues) - 1 if queue < 0 else queue)
    used = ring.take_used()
    assert used is not None
    return used.data


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"mac": "52:54:00:12:34"}, "no MAC address"),
        ({"mac": "52:54:00:12:34:5g"}, "no MAC address"),
        ({"mac": "53:54:00:12:34:56"}, "not the address of one card"),
        ({"mac": "00:00:00:00:00:00"}, "not the address of one card"),
        ({"mtu": 67}, "mtu 67"),
        ({"mtu": 65536}, "mtu 65536"),
        ({"queue_pairs": 0}, "0 queue pairs"),
        ({"queue_pairs": 9}, "9 queue pairs"),
        ({"vhost": "maybe"}, "'maybe'"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Net(backend=None, **spec)  # type: ignore[arg-type]


def test_configuration_space_says_who_it_is(plug: Plugger) -> None:
    made = plug(mac="52:54:00:12:34:56", mtu=9000, queue_pairs=2)
    assert made.rig.driver.read_config(0, 12) == bytes.fromhex("525400123456 0100 0200 2823".replace(" ", ""))
    assert made.rig.driver.read_features() & bits(abi.VIRTIO_NET_F_MTU, abi.VIRTIO_NET_F_MQ) == bits(
        abi.VIRTIO_NET_F_MTU, abi.VIRTIO_NET_F_MQ
    )


def test_the_backend_has_a_say_and_the_spec_the_last_word(plug: Plugger) -> None:
    port = {"mac": b"\x02\0\0\0\0\x01", "mtu": 4000}
    assert plug(port=port).rig.driver.read_config(0, 12) == b"\x02\0\0\0\0\x01\1\0\1\0\xa0\x0f"
    assert plug(port=port, mac="02:00:00:00:00:02").rig.driver.read_config(0, 6) == b"\x02\0\0\0\0\x02"
    first, second = (plug().rig.driver.read_config(0, 6) for _ in range(2))
    assert first != second
    assert first[0] & 3 == second[0] & 3 == 2


@pytest.mark.parametrize(
    ("accepted", "flags"),
    [
        ((), 0),
        ((abi.VIRTIO_NET_F_GUEST_TSO4,), 0),
        ((abi.VIRTIO_NET_F_GUEST_CSUM,), TUN_F_CSUM),
        ((abi.VIRTIO_NET_F_GUEST_CSUM, abi.VIRTIO_NET_F_GUEST_TSO4), TUN_F_CSUM | TUN_F_TSO4),
        ((abi.VIRTIO_NET_F_GUEST_CSUM, abi.VIRTIO_NET_F_GUEST_ECN), TUN_F_CSUM),
        ((abi.VIRTIO_NET_F_GUEST_CSUM, abi.VIRTIO_NET_F_GUEST_USO4), TUN_F_CSUM),
        (
            (abi.VIRTIO_NET_F_GUEST_CSUM, abi.VIRTIO_NET_F_GUEST_USO4, abi.VIRTIO_NET_F_GUEST_USO6),
            TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6,
        ),
    ],
)
def test_the_host_hands_over_what_the_driver_takes(accepted: tuple[int, ...], flags: int) -> None:
    assert net_features.tap_offloads(bits(*accepted)) == flags


def test_offloads_can_be_switched_while_the_driver_is_up(plug: Plugger) -> None:
    made = plug(port={"offloads": ALL_OFFLOADS})
    assert made.port.calls == [("offloads", ALL_OFFLOADS), ("pairs", 1)]
    made.port.calls.clear()
    wanted = bits(abi.VIRTIO_NET_F_GUEST_CSUM, abi.VIRTIO_NET_F_GUEST_TSO6).to_bytes(8, "little")
    assert command(made, abi.VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, wanted, queue=2) == OK
    assert made.port.calls == [("offloads", TUN_F_CSUM | TUN_F_TSO6)]
    refused = bits(abi.VIRTIO_NET_F_GUEST_USO4).to_bytes(8, "little")
    assert command(made, abi.VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, refused, queue=2) == ERR
    assert len(made.port.calls) == 1


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x00\x00", b"\x03\x00", b"\xff\xff"])
def test_a_number_of_pairs_that_there_is_not_is_refused(plug: Plugger, data: bytes) -> None:
    made = plug(queue_pairs=2)
    assert command(made, abi.VIRTIO_NET_CTRL_MQ, 0, data) == ERR


def test_each_pair_carries_frames_once_it_is_asked_for(plug: Plugger) -> None:
    made = plug(queue_pairs=3)
    for count in (3, 2, 1, 3):
        assert command(made, abi.VIRTIO_NET_CTRL_MQ, 0, count.to_bytes(2, "little")) == OK
        for index in range(count):
            made.rig.queues[2 * index + 1].add_chain(readable=[NO_HEADER + bytes(59) + bytes([index])])
            made.rig.kick(2 * index + 1)
            assert made.hosts[index].recv(2000)[-1] == index
            made.rig.queues[2 * index].add_chain(writable=[100])
            made.rig.kick(2 * index)
            made.hosts[index].send(NO_HEADER + bytes(60))
            made.rig.settle()
            assert len(made.rig.queues[2 * index].take_all_used()) == 1
    assert [call for call in made.port.calls if call[0] == "pairs"] == [("pairs", count) for count in (1, 3, 2, 1, 3)]


def test_without_multiqueue_the_control_queue_is_the_third(plug: Plugger) -> None:
    made = plug(queue_pairs=2, features=V1 | bits(abi.VIRTIO_NET_F_CTRL_VQ))
    assert command(made, abi.VIRTIO_NET_CTRL_RX, 0, b"\x01", queue=2) == OK
    assert command(made, abi.VIRTIO_NET_CTRL_MQ, 0, b"\x01\x00", queue=2) == ERR


@pytest.mark.parametrize("kind", [1, 2, 3, 6, 255])
def test_a_command_that_was_not_offered_is_an_error(plug: Plugger, kind: int) -> None:
    made = plug(queue_pairs=2)
    assert command(made, kind, 0, bytes(100)) == ERR


def test_a_command_without_room_for_an_answer_comes_back_empty(plug: Plugger) -> None:
    made = plug(queue_pairs=2)
    made.rig.queues[4].add_chain(readable=[b"\x04\x00\x02\x00"])
    made.rig.kick(4)
    used = made.rig.queues[4].take_used()
    assert used is not None
    assert used.written == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_on_the_control_ring_ends_in_needs_reset(plug: Plugger, name: str) -> None:
    made = plug(queue_pairs=2)
    ATTACKS[name](made.rig.queues[4])
    made.rig.kick(4)
    assert made.rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert made.rig.errors == []
    made.rig.restart()
    assert command(made, abi.VIRTIO_NET_CTRL_MQ, 0, b"\x02\x00") == OK


def test_an_interface_that_went_away_takes_the_link_down(plug: Plugger, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plug(port={"offloads": ALL_OFFLOADS})

    def fail(flags: int) -> None:
        raise OSError(errno.EBADFD, "File descriptor in bad state")

    monkeypatch.setattr(made.port, "set_offloads", fail)
    made.rig.restart()
    assert made.rig.driver.status == 15
    assert made.rig.warnings == ["device0: the link is down: cannot set its offloads: File descriptor in bad state"]
    assert not made.device.is_link_up


@pytest.mark.parametrize("framing", ["stream", "tap"])
def test_vhost_where_it_cannot_be_is_refused_before_the_machine_runs(plug: Plugger, framing: str) -> None:
    egress = {"egress": object()} if framing == "tap" else {}
    with pytest.raises(ConfigError, match="vhost carries the frames of a TAP"):
        plug(framing, port=egress, vhost="on")


def test_a_host_without_vhost_is_fine_unless_it_is_asked_for(plug: Plugger, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = vhost.VHOST_NET + "-missing"
    monkeypatch.setattr("kvmlite.devices.net.vhost.VHOST_NET", missing)
    monkeypatch.setitem(vhost._MODULES, missing, "vhost_net")
    assert plug().device.has_vhost is False
    with pytest.raises(OSError, match="cannot open"):
        plug(vhost="on")


def test_no_command_a_driver_could_think_of_does_harm(plug: Plugger) -> None:
    made = plug(queue_pairs=2, port={"offloads": ALL_OFFLOADS})

    @settings(max_examples=80)
    @given(
        st.binary(max_size=80)
        | st.builds(lambda head, data: head + data, st.sampled_from(HEADS), st.binary(max_size=9))
    )
    def survives(data: bytes) -> None:
        made.rig.queues[4].add_chain(readable=[data], writable=[1])
        made.rig.kick(4)
        used = made.rig.queues[4].take_used()
        assert used is not None
        assert used.data in (OK, ERR)

    survives()
    assert made.rig.errors == []
    assert made.rig.driver.status == 15
