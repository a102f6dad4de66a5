"""A byte stream over a serial port."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from kvmlite.bus import Bus
from kvmlite.devices import serial_channel
from kvmlite.devices.serial import SerialPort
from kvmlite.devices.serial_channel import SerialChannel
from kvmlite.host.eventfd import EventFd
from kvmlite.host.loop import DeviceLoop


class Rig:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.irq, self.notify = EventFd(), EventFd()
        self.loop = DeviceLoop(self.errors.append)
        self.channel = SerialChannel()
        self.port = SerialPort("serial1", self.channel.send, irq=self.irq, notify=self.notify)
        self.port.attach(Bus(), self.loop, 0x2F8)
        self.channel.attach(self.port, self.loop)
        self.loop.start()
        self.host_fd = self.channel.take_host_fd()

    def hang_up_host(self) -> None:
        os.close(self.host_fd)
        self.host_fd = -1

    def close(self) -> None:
        self.channel.give_up()
        self.loop.stop()
        self.port.close()
        self.channel.close()
        self.irq.close()
        self.notify.close()
        if self.host_fd >= 0:
            os.close(self.host_fd)
        assert self.errors == []


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_what_the_guest_writes_the_host_reads(rig: Rig) -> None:
    for byte in b"hello":
        rig.port.write(0, 1, byte)
    received = b""
    while len(received) < 5:
        received += os.read(rig.host_fd, 100)
    assert received == b"hello"


def test_what_the_host_writes_the_guest_reads(rig: Rig) -> None:
    os.write(rig.host_fd, b"typed")
    taken = bytearray()
    while len(taken) < 5:
        if rig.port.read(5, 1) & 1:
            taken.append(rig.port.read(0, 1))
    assert bytes(taken) == b"typed"


def test_a_slow_host_gets_everything(rig: Rig) -> None:
    data = os.urandom(400_000)
    sender = threading.Thread(target=rig.channel.send, args=(data,))
    sender.start()
    received = bytearray()
    while len(received) < len(data):
        received += os.read(rig.host_fd, 10_000)
    sender.join()
    assert bytes(received) == data


def test_a_host_that_has_gone_drops_output(rig: Rig) -> None:
    rig.hang_up_host()
    rig.channel.send(b"nobody")
    rig.channel.send(b"there")


def test_giving_up_ends_a_wait_for_a_host_that_does_not_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_channel, "_PATIENCE_S", 0.05)
    sender = threading.Thread(target=rig.channel.send, args=(bytes(2_000_000),))
    sender.start()
    rig.channel.give_up()
    sender.join(30)
    assert not sender.is_alive()
    rig.channel.send(bytes(2_000_000))  # from now on it does not wait at all


def test_hanging_up_delivers_the_rest_and_then_the_end(rig: Rig) -> None:
    for byte in b"last":
        rig.port.write(0, 1, byte)
    rig.channel.hang_up()
    received = b""
    while chunk := os.read(rig.host_fd, 100):
        received += chunk
    assert received == b"last"
    rig.channel.hang_up()


def test_a_host_end_nobody_took_is_closed_with_the_channel() -> None:
    SerialChannel().close()
