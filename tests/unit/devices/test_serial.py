"""The 16550A register file, as drivers use it, and the host's side of the port."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvmlite._native import ffi, lib
from kvmlite.bus import Bus
from kvmlite.devices.serial import SerialPort
from kvmlite.host.eventfd import EventFd
from kvmlite.host.loop import DeviceLoop

# Registers by offset (Linux: include/uapi/linux/serial_reg.h)
DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
IER_RDI, IER_THRI = 0x01, 0x02
IIR_NO_INT, IIR_THRI, IIR_RDI = 0x01, 0x02, 0x04
LCR_DLAB = 0x80
LSR_DR, LSR_EMPTY = 0x01, 0x60
MCR_LOOP = 0x10


class Registers:
    """The port as the guest's driver sees it."""

    def __init__(self) -> None:
        self.irq, self.notify = EventFd(), EventFd()
        self.native = ffi.new("struct kvl_serial *")
        assert lib.kvl_serial_init(self.native, self.irq.fd, self.notify.fd) == 0

    def close(self) -> None:
        lib.kvl_serial_deinit(self.native)
        self.irq.close()
        self.notify.close()

    def read(self, offset: int) -> int:
        return int(lib.kvl_serial_read(self.native, offset))

    def write(self, offset: int, value: int) -> None:
        lib.kvl_serial_write(self.native, offset, value)

    def type(self, data: bytes) -> int:
        return int(lib.kvl_serial_put_input(self.native, data, len(data)))

    def output(self) -> bytes:
        buffer = ffi.new("uint8_t[70000]")
        return bytes(ffi.buffer(buffer, lib.kvl_serial_take_output(self.native, buffer, 70000)))


@pytest.fixture
def port() -> Iterator[Registers]:
    port = Registers()
    yield port
    port.close()


def test_after_reset_the_transmitter_is_empty_and_nothing_waits(port: Registers) -> None:
    assert port.read(LSR) == LSR_EMPTY
    assert port.read(IIR) == IIR_NO_INT
    assert port.read(IER) == 0
    assert port.read(MSR) == 0xB0  # DCD, DSR, CTS: somebody is there
    assert not port.irq.drain()


def test_the_scratch_register_keeps_its_value(port: Registers) -> None:
    for value in (0x5A, 0xA5, 0):
        port.write(SCR, value)
        assert port.read(SCR) == value


def test_the_interrupt_enable_register_has_four_bits(port: Registers) -> None:
    """Linux autoconfig: IER must read 0 after 0 and 0x0f after 0x0f."""
    port.write(IER, 0)
    assert port.read(IER) & 0x0F == 0
    port.write(IER, 0xFF)
    assert port.read(IER) == 0x0F


def test_loopback_shows_the_outputs_as_inputs(port: Registers) -> None:
    """Linux autoconfig: MCR = LOOP | OUT2 | RTS must give MSR = DCD | CTS in its upper half."""
    port.write(MCR, MCR_LOOP | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, MCR_LOOP | 0x05)
    assert port.read(MSR) & 0xF0 == 0x60
    port.write(MCR, 0)
    assert port.read(MSR) & 0xF0 == 0xB0


def test_loopback_sends_a_byte_to_itself(port: Registers) -> None:
    port.write(MCR, MCR_LOOP)
    port.write(DATA, 0x42)
    assert port.read(LSR) & LSR_DR
    assert port.read(DATA) == 0x42
    assert port.output() == b""


def test_the_fifo_shows_in_the_identification_register(port: Registers) -> None:
    """Linux autoconfig: after FCR = 1, IIR bits 6 and 7 both set mean a 16550A."""
    port.write(FCR, 1)
    assert port.read(IIR) >> 6 == 3
    port.write(FCR, 0)
    assert port.read(IIR) >> 6 == 0


def test_the_divisor_latch_hides_data_and_interrupt_enable(port: Registers) -> None:
    port.write(IER, 0)
    port.write(LCR, LCR_DLAB | 3)
    port.write(DATA, 0x0C)
    port.write(IER, 0x01)
    assert (port.read(DATA), port.read(IER)) == (0x0C, 0x01)
    port.write(LCR, 3)
    assert port.read(IER) == 0
    assert port.output() == b""


def test_output_is_taken_in_order(port: Registers) -> None:
    for byte in b"hello":
        port.write(DATA, byte)
    assert port.notify.drain()
    assert port.output() == b"hello"
    assert port.output() == b""
    assert port.native.out_total == 5


def test_the_host_is_told_once_per_filled_queue(port: Registers) -> None:
    port.write(DATA, 1)
    assert os.eventfd_read(port.notify.fd) == 1
    port.write(DATA, 2)
    assert not port.notify.drain()
    port.output()
    port.write(DATA, 3)
    assert port.notify.drain()


def test_a_full_output_queue_counts_what_it_drops(port: Registers) -> None:
    size = int(lib.KVL_SERIAL_OUT_SIZE)
    for _ in range(size):
        port.write(DATA, 0x61)
    assert lib.kvl_serial_room(port.native) == 0
    port.write(DATA, 0x62)
    assert port.native.dropped == 1
    assert port.output() == b"a" * size
    assert lib.kvl_serial_room(port.native) == size


def test_the_transmitter_is_empty_even_when_the_queue_is_full(port: Registers) -> None:
    for _ in range(int(lib.KVL_SERIAL_OUT_SIZE)):
        port.write(DATA, 0x61)
    assert port.read(LSR) == LSR_EMPTY


def test_enabling_the_transmit_interrupt_raises_it_at_once(port: Registers) -> None:
    port.write(IER, IER_THRI)
    assert port.irq.drain()
    assert port.read(IIR) == IIR_THRI


def test_reading_the_identification_acknowledges_the_transmit_interrupt(port: Registers) -> None:
    port.write(IER, IER_THRI)
    assert port.read(IIR) == IIR_THRI
    assert port.read(IIR) == IIR_NO_INT


def test_each_byte_raises_the_transmit_interrupt_anew(port: Registers) -> None:
    port.write(IER, IER_THRI)
    port.read(IIR)
    port.irq.drain()
    port.write(DATA, 0x41)
    assert port.irq.drain()
    assert port.read(IIR) == IIR_THRI


def test_writing_interrupt_enable_again_raises_nothing_new(port: Registers) -> None:
    port.write(IER, IER_THRI)
    port.read(IIR)
    port.irq.drain()
    port.write(IER, IER_THRI)
    assert not port.irq.drain()
    assert port.read(IIR) == IIR_NO_INT


def test_switching_the_transmit_interrupt_off_and_on_raises_it(port: Registers) -> None:
    """Linux' lost-interrupt test does this and calls the port buggy if nothing comes."""
    port.write(IER, IER_THRI)
    port.read(IIR)
    port.irq.drain()
    port.write(IER, 0)
    port.write(IER, IER_THRI)
    assert port.irq.drain()
    assert port.read(IIR) == IIR_THRI


def test_input_raises_the_receive_interrupt(port: Registers) -> None:
    port.write(IER, IER_RDI)
    assert not port.irq.drain()
    assert port.type(b"x") == 1
    assert port.irq.drain()
    assert port.read(IIR) == IIR_RDI
    assert port.read(LSR) & LSR_DR
    assert port.read(DATA) == ord("x")
    assert port.read(IIR) == IIR_NO_INT
    assert not port.read(LSR) & LSR_DR


def test_input_that_waits_raises_as_soon_as_it_is_enabled(port: Registers) -> None:
    port.type(b"x")
    assert not port.irq.drain()
    port.write(IER, IER_RDI)
    assert port.irq.drain()


def test_the_line_stays_up_until_all_input_is_read(port: Registers) -> None:
    port.write(IER, IER_RDI)
    port.type(b"ab")
    assert os.eventfd_read(port.irq.fd) == 1
    assert port.read(DATA) == ord("a")
    assert port.read(IIR) == IIR_RDI
    assert not port.irq.drain()  # the level did not fall, so there is no new edge
    assert port.read(DATA) == ord("b")
    port.type(b"c")
    assert port.irq.drain()


def test_receive_comes_before_transmit(port: Registers) -> None:
    port.write(IER, IER_RDI | IER_THRI)
    port.type(b"x")
    assert port.read(IIR) == IIR_RDI
    assert port.read(IIR) == IIR_RDI
    port.read(DATA)
    assert port.read(IIR) == IIR_THRI
    assert port.read(IIR) == IIR_NO_INT


def test_reading_without_input_gives_zero(port: Registers) -> None:
    assert port.read(DATA) == 0


def test_clearing_the_receive_fifo_drops_input(port: Registers) -> None:
    port.type(b"abc")
    port.write(FCR, 0x03)
    assert not port.read(LSR) & LSR_DR
    assert port.type(b"d") == 1
    assert port.read(DATA) == ord("d")


def test_input_stops_at_the_queue_s_size_and_asks_for_more_at_half(port: Registers) -> None:
    size = int(lib.KVL_SERIAL_IN_SIZE)
    assert port.type(bytes(size + 10)) == size
    for _ in range(size // 2 - 1):
        port.read(DATA)
    assert not port.notify.drain()
    port.read(DATA)
    assert port.notify.drain()
    port.read(DATA)
    assert not port.notify.drain()


def test_clearing_a_full_receive_fifo_asks_for_more(port: Registers) -> None:
    size = int(lib.KVL_SERIAL_IN_SIZE)
    assert port.type(bytes(size + 10)) == size
    port.write(FCR, 0x03)
    assert port.notify.drain()


def test_offsets_beyond_the_port_float(port: Registers) -> None:
    assert port.read(8) == 0xFF
    port.write(8, 0x55)
    assert port.output() == b""


class Host:
    """A port with a loop and a sink that collects."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.errors: list[BaseException] = []
        self.irq, self.notify = EventFd(), EventFd()
        self.loop = DeviceLoop(self.errors.append)
        self.port = SerialPort("serial0", self.received.extend, irq=self.irq, notify=self.notify)
        self.bus = Bus()
        self.port.attach(self.bus, self.loop, 0x3F8)

    def close(self) -> None:
        self.loop.stop()
        self.port.close()
        self.irq.close()
        self.notify.close()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def test_the_port_claims_its_eight_registers(host: Host) -> None:
    assert repr(host.bus.ports[0]) == "serial0 at 0x3f8-0x3ff"


def test_the_loop_delivers_output(host: Host) -> None:
    host.loop.start()
    for byte in b"out":
        host.port.write(DATA, 1, byte)
    host.loop.call(lambda: None)
    host.loop.call(lambda: None)
    assert bytes(host.received) == b"out"
    assert host.port.output_total == 3


def test_output_that_comes_while_a_vcpu_delivers_is_not_left_waiting(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over = host.port._hand_over

    def find_nothing_more() -> bool:
        is_more = hand_over()
        monkeypatch.undo()
        host.port.write(DATA, 1, 0x62)  # another vCPU
        for _ in range(2):
            host.loop.call(lambda: None)  # the loop has been told, and finds the port taken
        return is_more

    monkeypatch.setattr(host.port, "_hand_over", find_nothing_more)
    host.loop.start()
    host.port.drain()
    for _ in range(2):
        host.loop.call(lambda: None)
    assert bytes(host.received) == b"b"


def test_a_vcpu_without_room_delivers_itself(host: Host) -> None:
    """The loop is not running: nothing but the vCPU's own write empties the queue."""
    for number in range(70000):
        host.port.write(DATA, 1, number & 0xFF)
    host.port.drain()
    assert bytes(host.received) == (bytes(range(256)) * 274)[:70000]


def test_close_delivers_the_rest() -> None:
    host = Host()
    host.port.write(DATA, 1, 0x7A)
    host.close()
    assert bytes(host.received) == b"z"


def test_input_that_does_not_fit_is_kept_and_follows(host: Host) -> None:
    host.loop.start()
    data = os.urandom(10000)
    host.loop.call(lambda: host.port.put_input(data))
    assert host.port.pending_input == 10000 - 4096
    taken = bytearray()
    while len(taken) < 10000:
        if host.port.read(LSR, 1) & LSR_DR:
            taken.append(host.port.read(DATA, 1))
        else:
            host.loop.call(lambda: None)
    assert bytes(taken) == data


def test_end_of_input_leaves_the_port_silent(host: Host) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"bye")
    os.close(write_end)
    host.port.feed_from(read_end)
    host.loop.start()
    taken = bytearray()
    while len(taken) < 3:
        if host.port.read(LSR, 1) & LSR_DR:
            taken.append(host.port.read(DATA, 1))
    host.loop.call(lambda: None)
    host.loop.call(lambda: None)
    os.close(read_end)
    assert bytes(taken) == b"bye"
    assert not host.port.read(LSR, 1) & LSR_DR
    assert host.errors == []


def test_input_is_read_no_further_than_the_guest_takes_it(host: Host) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    host.port.feed_from(read_end)
    host.loop.start()
    written = 0
    try:
        while True:
            written += os.write(write_end, bytes(4096))
            host.loop.call(lambda: None)
    except BlockingIOError:
        pass
    host.port.stop_input()
    os.close(read_end)
    os.close(write_end)
    assert written <= 65536 + 4 * 4096  # the pipe, the port's queue, and one read beyond it
