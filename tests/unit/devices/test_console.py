from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from kvmlite.abi.virtio import VRING_DESC_F_WRITE, DeviceStatus
from kvmlite.devices.console import Console
from kvmlite.devices.console.device import VirtioConsole
from kvmlite.devices.console.port import ConsolePort
from kvmlite.errors import ConfigError
from kvmlite.testing import VirtioRig, check_virtio_device

AGENT = "org.kvmlite.agent.0"
RX0, TX0, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
MULTIPORT, SIZE = 1 << 1, 1 << 0

READY, PORT_READY, OPEN = 0, 3, 6


class Guest(VirtioRig):
    """A console and the driver of a guest that knows several ports."""

    def __init__(self) -> None:
        super().__init__(Console(ports=(AGENT,), cols=80, rows=24).attach)
        assert isinstance(self.device, VirtioConsole)
        self.console = self.device

    @property
    def agent(self) -> ConsolePort:
        return self.console.port(AGENT)

    def say(self, number: int, event: int, value: int) -> None:
        message = number.to_bytes(4, "little") + event.to_bytes(2, "little") + value.to_bytes(2, "little")
        self.send(CONTROL_TX, message)

    def send(self, queue: int, *data: bytes) -> None:
        self.queues[queue].add_chain(readable=data)
        self.kick(queue)
        self.queues[queue].take_all_used()

    def offer(self, queue: int, size: int, count: int = 1) -> None:
        for _ in range(count):
            self.queues[queue].add_chain(writable=[size])
        self.kick(queue)

    def heard(self, queue: int = CONTROL_RX) -> list[bytes]:
        self.loop.run()
        return [used.data for used in self.queues[queue].take_all_used()]

    def bring_up(self) -> None:
        """Go as far as Linux does before anybody opens a port."""
        self.start()
        self.offer(CONTROL_RX, 128, 16)
        self.say(0, READY, 1)
        for number in (0, 1):
            self.say(number, PORT_READY, 1)
        self.heard()


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as made:
        yield made


@pytest.fixture
def up(guest: Guest) -> Guest:
    guest.bring_up()
    return guest


def connect(guest: Guest, port: ConsolePort) -> socket.socket:
    """Connect the host's end; the test reads it without waiting."""
    end = socket.socket(fileno=port.connect())
    end.setblocking(False)
    guest.loop.run()
    return end


def test_the_device_conforms() -> None:
    check_virtio_device(Console(ports=("a", "b")).attach)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ports": ("a/b",)}, "port name 'a/b'"),
        ({"ports": ("",)}, "port name ''"),
        ({"ports": ("x" * 65,)}, "port name 'xxx"),
        ({"ports": ("a", "a")}, "two ports have the same name"),
        ({"ports": tuple(map(str, range(31)))}, "31 ports, allowed are 30"),
        ({"cols": 65536}, "cols=65536 is not in 0..65535"),
        ({"rows": -1}, "rows=-1 is not in 0..65535"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Console(**fields)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_config_space_tells_size_and_ports(guest: Guest) -> None:
    assert guest.driver.read_config(0, 12) == bytes.fromhex("5000 1800 02000000 00000000")
    assert guest.driver.read_features() & 7 == 3
    assert guest.device.queue_sizes == (128, 128, 32, 32, 128, 128)


def test_ports_are_announced_named_and_sized(guest: Guest) -> None:
    guest.start()
    guest.offer(CONTROL_RX, 128, 16)
    guest.say(0, READY, 1)
    assert guest.heard() == [bytes.fromhex("00000000 0100 0000"), bytes.fromhex("01000000 0100 0000")]
    guest.say(0, PORT_READY, 1)
    assert guest.heard() == [bytes.fromhex("00000000 0400 0100"), bytes.fromhex("00000000 0500 0000 5000 1800")]
    guest.say(1, PORT_READY, 1)
    assert guest.heard() == [bytes.fromhex("01000000 0700 0100") + b"org.kvmlite.agent.0"]


def test_messages_wait_for_buffers_and_keep_their_order(guest: Guest) -> None:
    guest.start()
    guest.say(0, READY, 1)
    guest.say(0, PORT_READY, 1)
    assert guest.heard() == []
    guest.offer(CONTROL_RX, 128)
    assert guest.heard() == [bytes.fromhex("00000000 0400 0100")]
    guest.offer(CONTROL_RX, 128, 3)
    assert guest.heard() == [bytes.fromhex("00000000 0500 0000 5000 1800"), bytes.fromhex("01000000 0100 0000")]


def test_a_driver_that_repeats_itself_costs_no_memory(guest: Guest) -> None:
    guest.start()
    for _ in range(500):
        guest.say(0, READY, 1)
        guest.say(1, PORT_READY, 1)
    guest.offer(CONTROL_RX, 128, 16)
    assert len(guest.heard()) == 2


def test_a_control_message_shorter_than_its_header_is_a_fault(up: Guest) -> None:
    up.send(CONTROL_TX, b"1234567")
    assert up.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert up.transport.statistics().last_fault == "control message of 7 bytes, needed are 8"
    assert up.errors == []


def test_a_control_buffer_too_small_for_its_message_is_a_fault(guest: Guest) -> None:
    guest.start()
    guest.offer(CONTROL_RX, 7)
    guest.say(0, READY, 1)
    assert guest.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert guest.transport.statistics().last_fault == "control buffer of 7 bytes, needed are 8"


def test_unknown_ports_and_events_are_ignored(up: Guest) -> None:
    for number, event in ((2, PORT_READY), (0xFFFFFFFF, OPEN), (0, 8), (0, 0xFFFF)):
        up.say(number, event, 1)
    assert up.driver.status == 15
    assert up.heard() == []


def test_the_guest_hears_when_the_host_opens_and_closes(up: Guest) -> None:
    up.say(1, OPEN, 1)
    end = connect(up, up.agent)
    assert up.heard() == [bytes.fromhex("01000000 0600 0100")]
    end.close()
    assert up.heard() == []  # nobody looks at the socket while there is nowhere to put its bytes
    up.offer(RX1, 64)
    assert up.heard() == [bytes.fromhex("01000000 0600 0000")]
    assert not up.agent.is_connected


def test_a_host_that_came_first_is_announced_with_the_port(guest: Guest) -> None:
    with connect(guest, guest.agent):
        guest.start()
        guest.offer(CONTROL_RX, 128, 16)
        guest.say(0, READY, 1)
        guest.heard()
        guest.say(1, PORT_READY, 1)
        assert guest.heard()[-1] == bytes.fromhex("01000000 0600 0100")


def test_a_second_connection_supersedes_the_first(up: Guest) -> None:
    with connect(up, up.agent) as first, connect(up, up.agent) as second:
        assert first.recv(1) == b""
        assert up.heard() == [bytes.fromhex(f"01000000 0600 {value}") for value in ("0100", "0000", "0100")]
        up.send(TX1, b"hello")
        assert second.recv(10) == b"hello"


def test_guest_output_reaches_the_host_in_order(up: Guest) -> None:
    with connect(up, up.agent) as end:
        up.send(TX1, b"hel", b"lo ")
        up.send(TX1, b"world")
        assert end.recv(100) == b"hello world"
        assert up.take_irq() > 0


def test_guest_output_without_a_host_is_dropped(up: Guest) -> None:
    up.send(TX1, b"nobody listens")
    with connect(up, up.agent) as end:
        up.send(TX1, b"now")
        assert end.recv(100) == b"now"


def test_output_waits_in_the_queue_while_the_host_does_not_read(up: Guest) -> None:
    with connect(up, up.agent) as end:
        queue = up.queues[TX1]
        up.memory.write(0x400000, bytes(range(256)) * 8192)  # 2 MiB: more than a socket holds
        queue.add_buffers([(0x400000, 2 << 20, 0)])
        queue.add_chain(readable=[b"the end"])
        up.kick(TX1)
        assert queue.used_idx == 0
        assert not up.loop._poll(), "busy while the host does not read"
        received = bytearray()
        while queue.used_idx < 2:
            received += end.recv(1 << 20)
            up.loop.run()
        while len(received) < (2 << 20) + 7:
            received += end.recv(1 << 20)
        assert received == bytes(range(256)) * 8192 + b"the end"


def test_output_of_any_size_is_dropped_at_once_if_nobody_listens(up: Guest) -> None:
    queue = up.queues[TX1]
    queue.add_buffers([(0, 8 << 20, 0)] * queue.size)
    before = up.loop.rounds
    up.kick(TX1)
    assert queue.used_idx == 1
    assert up.loop.rounds - before < 10


def test_a_host_that_leaves_unread_output_frees_the_queue(up: Guest) -> None:
    end = connect(up, up.agent)
    up.queues[TX1].add_buffers([(0x400000, 2 << 20, 0)])
    up.kick(TX1)
    assert up.queues[TX1].used_idx == 0
    end.close()
    up.loop.run()
    assert up.queues[TX1].used_idx == 1
    assert up.heard()[-1] == bytes.fromhex("01000000 0600 0000")


def test_a_chain_that_claims_4_gib_does_not_hold_up_the_others() -> None:
    with Guest() as guest:
        guest.bring_up()
        seen = 0

        def count(data: bytes) -> None:
            nonlocal seen
            assert len(data) <= 65536
            seen += len(data)

        guest.console.console.set_sink(count)
        guest.queues[TX0].add_buffers([(0, 8 << 20, 0)] * 15)
        guest.driver.notify(TX0)
        guest.loop.run_once()
        assert seen == 16 * 65536
        guest.loop.run()
        assert seen == 120 << 20


def test_host_input_waits_until_the_guest_has_opened_the_port(up: Guest) -> None:
    with connect(up, up.agent) as end:
        up.heard()
        up.offer(RX1, 64, 2)
        end.send(b"hello")
        assert up.heard(RX1) == []
        up.say(1, OPEN, 1)
        assert up.heard(RX1) == [b"hello"]


def test_host_input_waits_in_the_socket_for_buffers(up: Guest) -> None:
    up.say(1, OPEN, 1)
    with connect(up, up.agent) as end:
        end.send(b"0123456789")
        assert up.heard(RX1) == []
        assert not up.loop._poll(), "busy while the guest has no buffers"
        for expected in (b"0123", b"4567", b"89"):
            up.offer(RX1, 4)
            assert up.heard(RX1) == [expected]


def test_buffers_without_room_come_back(up: Guest) -> None:
    up.say(1, OPEN, 1)
    with connect(up, up.agent) as end:
        up.queues[RX1].add_chain(readable=[b"no room"])
        up.offer(RX1, 8)
        end.send(b"data")
        assert up.heard(RX1) == [b"", b"data"]


def test_a_host_that_only_stops_writing_still_reads(up: Guest) -> None:
    up.say(1, OPEN, 1)
    with connect(up, up.agent) as end:
        up.offer(RX1, 8)
        end.shutdown(socket.SHUT_WR)
        up.loop.run()
        assert up.agent.is_connected
        up.send(TX1, b"more")
        assert end.recv(10) == b"more"


def test_when_the_guest_closes_the_host_reads_all_then_end_of_stream(up: Guest) -> None:
    up.say(1, OPEN, 1)
    with connect(up, up.agent) as end:
        up.heard()
        up.queues[TX1].add_chain(readable=[b"last words"])
        up.say(1, OPEN, 0)
        assert end.recv(100) == b"last words"
        assert end.recv(100) == b""
        assert up.heard() == [bytes.fromhex("01000000 0600 0000")]


def test_a_reset_ends_the_streams_of_the_host(up: Guest) -> None:
    with connect(up, up.agent) as end, connect(up, up.console.console) as terminal:
        up.driver.reset()
        assert end.recv(1) == b""
        assert terminal.recv(1) == b""
        assert up.loop.watched == set()
    up.restart()
    up.bring_up()
    with connect(up, up.agent) as end:
        up.send(TX1, b"again")
        assert end.recv(10) == b"again"


def test_console_output_goes_to_the_sink_and_to_the_host(up: Guest) -> None:
    seen: list[bytes] = []
    up.console.console.set_sink(seen.append)
    up.send(TX0, b"before")
    with connect(up, up.console.console) as end:
        up.send(TX0, b"after")
        assert end.recv(100) == b"after"
    assert seen == [b"before", b"after"]


def test_a_resize_changes_config_space_and_tells_the_guest(up: Guest) -> None:
    up.driver.take_interrupt()
    up.console.resize(132, 50)
    assert up.heard() == [bytes.fromhex("00000000 0500 0000 8400 3200")]
    assert up.driver.take_interrupt() == 3
    assert up.driver.read_config(0, 4) == bytes.fromhex("8400 3200")
    with pytest.raises(ValueError, match="65536x1"):
        up.console.resize(65536, 1)


def test_a_driver_without_multiport_has_the_console_only(guest: Guest) -> None:
    guest.start(features=SIZE)
    with connect(guest, guest.console.console) as end:
        guest.offer(RX0, 16)
        end.send(b"key")
        assert guest.heard(RX0) == [b"key"]
        guest.send(TX0, b"echo")
        assert end.recv(10) == b"echo"
    for queue in (CONTROL_RX, CONTROL_TX, RX1, TX1):
        guest.offer(queue, 8)
        assert guest.queues[queue].used_idx == 0


def test_a_broken_port_queue_leaves_the_other_ports_alone(up: Guest) -> None:
    up.say(1, OPEN, 1)
    with connect(up, up.agent) as end, connect(up, up.console.console) as terminal:
        up.queues[RX1].add_buffers([(0xD0000000, 8, VRING_DESC_F_WRITE)])
        up.kick(RX1)
        end.send(b"data")
        up.loop.run()
        assert up.driver.status == 15 | DeviceStatus.NEEDS_RESET
        up.send(TX0, b"still here")
        assert terminal.recv(20) == b"still here"
        assert up.errors == []


def test_ports_are_found_by_name(guest: Guest) -> None:
    assert guest.console.port(AGENT).number == 1
    with pytest.raises(KeyError, match="no port 'x'"):
        guest.console.port("x")


def test_connections_never_taken_up_are_closed_with_the_device() -> None:
    guest = Guest()
    end = guest.agent.connect()
    guest.close()
    assert os.read(end, 1) == b""
    os.close(end)


def test_a_host_that_came_and_went_unheard_is_not_mentioned(guest: Guest) -> None:
    guest.start()
    guest.say(0, READY, 1)
    guest.say(1, PORT_READY, 1)
    guest.say(1, OPEN, 1)
    guest.offer(RX1, 8)
    connect(guest, guest.agent).close()
    guest.loop.run()
    guest.offer(CONTROL_RX, 128, 8)
    assert [message[4:6] for message in guest.heard()] == [b"\x01\0", b"\x07\0"]
