"""Which device owns an address: port I/O and MMIO, for the exits that C does not own.

The C loop has a copy of the ranges (``native``): an exit inside a claimed range comes up to Python, except for serial
ports and a virtio-mmio device's interrupt registers; everything else is a floating bus that C answers itself.
"""

from __future__ import annotations

from kvmlite._native import ffi, lib
from kvmlite.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class BusDevice(Protocol):
        """Something with registers. Called on the thread of the vCPU that exited; must not block for long.

        A guest may use any offset and width: neither call may raise for a guest's mistake.
        """

        def read(self, offset: int, size: int) -> int:
            """Value of ``size`` bytes (1, 2, 4, 8) at ``offset``, little-endian."""

        def write(self, offset: int, size: int, value: int) -> None:
            """Store ``value``."""


class BusRange:
    """A claimed range: ``size`` bytes from ``base``, and its owner."""

    __slots__ = ("base", "device", "name", "size")

    def __init__(self, base: int, size: int, device: BusDevice, name: str) -> None:
        self.base, self.size, self.device, self.name = base, size, device, name

    def __repr__(self) -> str:
        return f"{self.name} at {self.base:#x}-{self.base + self.size - 1:#x}"


class Bus:
    """Ports and MMIO of one machine. Filled by the builder before a vCPU runs, read-only afterwards."""

    def __init__(self) -> None:
        self.native = ffi.new("struct kvl_bus *")
        self.ports: list[BusRange] = []
        self.mmio: list[BusRange] = []
        self._owned: list[Any] = []

    def claim_ports(self, base: int, size: int, device: BusDevice, name: str, *, serial: Any = None) -> None:
        """Give I/O ports to a device.

        Args:
            serial: ``struct kvl_serial *`` behind these ports: C then handles the exit and Python sees only writes
                for which its output queue has no room.

        Raises:
            ConfigError: The range overlaps another.
        """
        self._claim(self.ports, self.native.ports, base, size, device, name, serial=serial)
        self.native.port_count = len(self.ports)

    def claim_mmio(self, base: int, size: int, device: BusDevice, name: str, *, irq: Any = None) -> None:
        """Give guest-physical addresses to a device.

        Args:
            irq: ``struct kvl_irq *`` of a virtio-mmio device: C then answers its interrupt status and acknowledge
                registers.

        Raises:
            ConfigError: The range overlaps another.
        """
        self._claim(self.mmio, self.native.mmio, base, size, device, name, irq=irq)
        self.native.mmio_count = len(self.mmio)

    def _claim(
        self, ranges: list[BusRange], native: Any, base: int, size: int, device: BusDevice, name: str, **in_c: Any
    ) -> None:
        for other in ranges:
            if base < other.base + other.size and other.base < base + size:
                raise ConfigError(f"{name} at {base:#x}-{base + size - 1:#x} overlaps {other!r}")
        if len(ranges) == lib.KVL_BUS_MAX_RANGES:
            raise ConfigError(f"{name}: no more than {lib.KVL_BUS_MAX_RANGES} devices fit on a bus")
        entry = native[len(ranges)]
        entry.base, entry.size = base, size
        for field, part in in_c.items():
            if part is not None:
                setattr(entry, field, part)
                self._owned.append(part)
        ranges.append(BusRange(base, size, device, name))

    def find_port(self, port: int) -> BusRange | None:
        """Who owns an I/O port."""
        return _find(self.ports, port)

    def find_mmio(self, gpa: int) -> BusRange | None:
        """Who owns a guest-physical address."""
        return _find(self.mmio, gpa)


def _find(ranges: list[BusRange], address: int) -> BusRange | None:
    for entry in ranges:
        if entry.base <= address < entry.base + entry.size:
            return entry
    return None
