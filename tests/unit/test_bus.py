"""Who owns an address."""

from __future__ import annotations

import pytest

from kvmlite._native import lib
from kvmlite.bus import Bus
from kvmlite.errors import ConfigError


class Silent:
    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        return


@pytest.fixture
def bus() -> Bus:
    bus = Bus()
    bus.claim_ports(0x3F8, 8, Silent(), "serial0")
    bus.claim_mmio(0xD0000000, 0x1000, Silent(), "rng0")
    return bus


@pytest.mark.parametrize(("port", "name"), [(0x3F7, None), (0x3F8, "serial0"), (0x3FF, "serial0"), (0x400, None)])
def test_a_port_belongs_to_its_range(bus: Bus, port: int, name: str | None) -> None:
    owner = bus.find_port(port)
    assert (owner.name if owner else None) == name


@pytest.mark.parametrize(
    ("gpa", "name"), [(0xCFFFFFFF, None), (0xD0000000, "rng0"), (0xD0000FFF, "rng0"), (0xD0001000, None)]
)
def test_an_address_belongs_to_its_range(bus: Bus, gpa: int, name: str | None) -> None:
    owner = bus.find_mmio(gpa)
    assert (owner.name if owner else None) == name


def test_ports_and_addresses_are_different_spaces(bus: Bus) -> None:
    assert bus.find_mmio(0x3F8) is None
    bus.claim_mmio(0x3F8, 8, Silent(), "elsewhere")


@pytest.mark.parametrize(("base", "size"), [(0x3F8, 8), (0x3F7, 2), (0x3FF, 1), (0x3F0, 0x20), (0x3FA, 1)])
def test_an_overlap_is_refused_and_names_both(bus: Bus, base: int, size: int) -> None:
    with pytest.raises(ConfigError, match=r"^second at 0x3[0-9a-f]+-0x[0-9a-f]+ overlaps serial0 at 0x3f8-0x3ff$"):
        bus.claim_ports(base, size, Silent(), "second")
    assert len(bus.ports) == bus.native.port_count == 1


@pytest.mark.parametrize("base", [0x3F0, 0x400])
def test_neighbours_do_not_overlap(bus: Bus, base: int) -> None:
    bus.claim_ports(base, 8, Silent(), "second")
    assert bus.native.port_count == 2


def test_c_has_a_copy_of_the_ranges(bus: Bus) -> None:
    assert (bus.native.ports[0].base, bus.native.ports[0].size) == (0x3F8, 8)
    assert (bus.native.mmio[0].base, bus.native.mmio[0].size) == (0xD0000000, 0x1000)
    assert (bus.native.port_count, bus.native.mmio_count) == (1, 1)


def test_a_full_bus_refuses_one_more() -> None:
    bus = Bus()
    for number in range(lib.KVL_BUS_MAX_RANGES):
        bus.claim_ports(number, 1, Silent(), f"port{number}")
    with pytest.raises(ConfigError, match="no more than 64 devices fit on a bus"):
        bus.claim_ports(0x1000, 1, Silent(), "one more")
    assert bus.native.port_count == 64
