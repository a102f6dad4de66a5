"""Registers with which a guest ends its machine."""

from __future__ import annotations

import pytest

from kvmlite.bus import Bus
from kvmlite.devices.power import PowerRegisters


class Machine:
    def __init__(self) -> None:
        self.events: list[object] = []
        self.bus = Bus()
        PowerRegisters(
            on_poweroff=lambda: self.events.append("poweroff"),
            on_reset=lambda: self.events.append("reset"),
            on_debug_exit=self.events.append,
        ).attach(self.bus)

    def write(self, port: int, value: int, size: int = 1) -> None:
        owner = self.bus.find_port(port)
        assert owner is not None
        owner.device.write(port - owner.base, size, value)

    def read(self, port: int) -> int:
        owner = self.bus.find_port(port)
        assert owner is not None
        return owner.device.read(port - owner.base, 1)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("port", "value", "event"),
    [
        (0x64, 0xFE, "reset"),
        (0x604, 0x01, "reset"),
        (0xCF9, 0x04, "reset"),
        (0xCF9, 0x06, "reset"),
        (0xCF9, 0x0E, "reset"),
        (0x600, 0x34, "poweroff"),
        (0x600, 0xF7, "poweroff"),
        (0xF4, 0, 1),
        (0xF4, 0x10, 0x21),
        (0xF4, 0xFF, 0xFF),
        (0xF4, 0x12345680, 0x01),
    ],
)
def test_a_write_ends_the_machine(machine: Machine, port: int, value: int, event: object) -> None:
    machine.write(port, value, 4 if value > 0xFF else 1)
    assert machine.events == [event]


@pytest.mark.parametrize("value", [v for v in range(256) if v & 0x3C != 0x34])
def test_sleep_control_needs_enable_and_s5(machine: Machine, value: int) -> None:
    machine.write(0x600, value)
    assert machine.events == []


@pytest.mark.parametrize("value", [v for v in range(256) if v != 0xFE])
def test_the_keyboard_controller_knows_one_command(machine: Machine, value: int) -> None:
    machine.write(0x64, value)
    assert machine.events == []


@pytest.mark.parametrize("value", [0, 2, 0xFF])
def test_the_acpi_reset_value_is_one(machine: Machine, value: int) -> None:
    machine.write(0x604, value)
    assert machine.events == []


def test_reads_are_constants(machine: Machine) -> None:
    ports = (0x64, 0xF4, 0x600, 0x601, 0x604, 0xCF9)
    assert [machine.read(port) for port in ports] == [0xFF, 0, 0, 0, 0, 0]
    machine.write(0x601, 0xFF)
    assert machine.read(0x601) == 0
    assert machine.events == []
