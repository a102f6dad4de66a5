"""Registers with which a guest ends its machine: ACPI sleep and reset, the keyboard controller's reset, debug exit."""

from __future__ import annotations

from kvmlite.abi.layout import (
    ACPI_RESET_PORT,
    ACPI_RESET_VALUE,
    ACPI_SLEEP_CONTROL_PORT,
    ACPI_SLEEP_STATUS_PORT,
    DEBUG_EXIT_PORT,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.bus import Bus

I8042_COMMAND_PORT = 0x64
I8042_RESET_PULSE = 0xFE
PCI_RESET_PORT = 0xCF9
PCI_RESET_CPU = 1 << 2
SLEEP_ENABLE = 1 << 5
SLEEP_TYPE_SHIFT = 2
SLEEP_TYPE_S5 = 5


class PowerRegisters:
    """The ways out, each calling back on the vCPU thread that wrote it.

    | port | width | write |
    |---|---|---|
    | 0x64 | 1 | 0xfe: reset (keyboard controller pulse) |
    | 0xf4 | 1, 2, 4 | v: debug exit with status ``2 * v + 1`` modulo 256 (QEMU's isa-debug-exit) |
    | 0x600 | 1 | ACPI sleep control: SLP_EN with SLP_TYP 5 is power off (ACPI 6.4, 4.8.3.7) |
    | 0x601 | 1 | ACPI sleep status |
    | 0x604 | 1 | 1: reset (the FADT's RESET_REG) |
    | 0xcf9 | 1 | bit 2: reset |
    """

    def __init__(
        self, *, on_poweroff: Callable[[], None], on_reset: Callable[[], None], on_debug_exit: Callable[[int], None]
    ) -> None:
        self._on_poweroff = on_poweroff
        self._on_reset = on_reset
        self._on_debug_exit = on_debug_exit

    def attach(self, bus: Bus) -> None:
        """Claim the ports."""
        for port, name, write in (
            (I8042_COMMAND_PORT, "i8042", self._write_i8042),
            (DEBUG_EXIT_PORT, "debug-exit", self._on_debug_exit_value),
            (ACPI_SLEEP_CONTROL_PORT, "acpi-sleep-control", self._write_sleep_control),
            (ACPI_SLEEP_STATUS_PORT, "acpi-sleep-status", None),
            (ACPI_RESET_PORT, "acpi-reset", self._write_acpi_reset),
            (PCI_RESET_PORT, "pci-reset", self._write_pci_reset),
        ):
            bus.claim_ports(port, 1, _Register(write, 0xFF if port == I8042_COMMAND_PORT else 0), name)

    def _write_i8042(self, value: int) -> None:
        if value & 0xFF == I8042_RESET_PULSE:
            self._on_reset()

    def _on_debug_exit_value(self, value: int) -> None:
        self._on_debug_exit((2 * value + 1) & 0xFF)

    def _write_sleep_control(self, value: int) -> None:
        if value & SLEEP_ENABLE and (value >> SLEEP_TYPE_SHIFT) & 7 == SLEEP_TYPE_S5:
            self._on_poweroff()

    def _write_acpi_reset(self, value: int) -> None:
        if value & 0xFF == ACPI_RESET_VALUE:
            self._on_reset()

    def _write_pci_reset(self, value: int) -> None:
        if value & PCI_RESET_CPU:
            self._on_reset()


class _Register:
    """One port: writes go to a function, reads give a constant."""

    __slots__ = ("_value", "_write")

    def __init__(self, write: Callable[[int], None] | None, value: int) -> None:
        self._write = write
        self._value = value

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        if self._write is not None:
            self._write(value)
