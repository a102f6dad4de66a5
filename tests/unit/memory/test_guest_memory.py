"""The one door to guest RAM: what is inside a region and what is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmlite._native import ffi, lib
from kvmlite.errors import ConfigError, HostError
from kvmlite.memory import GuestMemory, GuestMemoryError
from kvmlite.memory.guest_memory import split_at_hole

pytestmark = pytest.mark.usefixtures("mappings")

PAGE = 4096
# Two regions with a hole of one page, and one that adjoins the second
LAYOUT = [(0, 4 * PAGE), (5 * PAGE, 2 * PAGE), (7 * PAGE, PAGE)]


@pytest.fixture(params=["anonymous", "memfd"])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    memory = GuestMemory(7 * PAGE, backing=request.param, layout=LAYOUT)
    yield memory
    memory.close()


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (2 << 20, [(0, 2 << 20)]),
        (0xC0000000 - PAGE, [(0, 0xC0000000 - PAGE)]),
        (0xC0000000, [(0, 0xC0000000)]),
        (0xC0000000 + PAGE, [(0, 0xC0000000), (0x100000000, PAGE)]),
        (4 << 30, [(0, 0xC0000000), (0x100000000, 0x40000000)]),
    ],
)
def test_ram_is_split_at_the_32_bit_hole(size: int, regions: list[tuple[int, int]]) -> None:
    assert split_at_hole(size) == regions


def test_what_was_written_is_read(memory: GuestMemory) -> None:
    memory.write(10, b"guest")
    assert memory.read(8, 9) == b"\0\0guest\0\0"


def test_fresh_ram_is_zero(memory: GuestMemory) -> None:
    assert memory.read(5 * PAGE, 2 * PAGE) == bytes(2 * PAGE)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0, 1),
        (0, 4 * PAGE),
        (4 * PAGE - 1, 1),
        (5 * PAGE, 1),
        (5 * PAGE, 2 * PAGE),
        (7 * PAGE, PAGE),
        (8 * PAGE - 1, 1),
    ],
)
def test_a_range_inside_a_region_is_good(memory: GuestMemory, gpa: int, size: int) -> None:
    memory.write(gpa, b"\xa5" * size)
    assert memory.read(gpa, size) == b"\xa5" * size


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (-1, 1),
        (-1, 2),
        (0, -1),
        (0, 4 * PAGE + 1),
        (4 * PAGE - 1, 2),
        (4 * PAGE, 1),
        (5 * PAGE - 1, 1),
        (5 * PAGE - 1, 2),
        (5 * PAGE, 2 * PAGE + 1),  # two regions that adjoin are still two
        (7 * PAGE - 1, 2),
        (8 * PAGE - 1, 2),
        (8 * PAGE, 1),
        (1 << 63, 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),  # wraps to 0
        ((1 << 64) - PAGE, 2 * PAGE),
        (1, (1 << 64) - 1),
        (PAGE, (1 << 64) - PAGE),
        (1 << 64, 1),
        (0, 1 << 64),
    ],
)
def test_any_other_range_is_refused(memory: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(GuestMemoryError) as caught:
        memory.read(gpa, size)
    assert (caught.value.gpa, caught.value.size) == (gpa, size)


@pytest.mark.parametrize("gpa", [4 * PAGE - 2, 7 * PAGE - 1, 8 * PAGE])
def test_a_refused_write_changes_nothing(memory: GuestMemory, gpa: int) -> None:
    before = memory.read(0, 4 * PAGE) + memory.read(5 * PAGE, 2 * PAGE) + memory.read(7 * PAGE, PAGE)
    with pytest.raises(GuestMemoryError):
        memory.write(gpa, b"\xff" * 3)
    assert memory.read(0, 4 * PAGE) + memory.read(5 * PAGE, 2 * PAGE) + memory.read(7 * PAGE, PAGE) == before


def test_the_message_names_the_range(memory: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError, match=r"guest-physical range 0x4000 \(size 0x10\) is not inside one region"):
        memory.read(0x4000, 0x10)


def test_reading_nothing_needs_a_valid_address(memory: GuestMemory) -> None:
    assert memory.read(4 * PAGE - 1, 0) == b""
    with pytest.raises(GuestMemoryError):
        memory.read(4 * PAGE, 0)


def test_c_and_python_agree_on_a_range(memory: GuestMemory) -> None:
    buffer = ffi.new("uint8_t[8]")
    memory.write(100, b"8 bytes!")
    assert lib.kvl_mem_read(memory.native, 100, buffer, 8) == 0
    assert bytes(buffer) == b"8 bytes!"
    assert lib.kvl_mem_read(memory.native, 4 * PAGE - 4, buffer, 8) == -1
    assert lib.kvl_mem_write(memory.native, (1 << 64) - 4, buffer, 8) == -1
    assert bytes(buffer) == b"8 bytes!"


def test_regions_are_aligned_for_huge_pages_and_have_their_place_in_the_memfd(memory: GuestMemory) -> None:
    assert [(r.gpa, r.size) for r in memory.regions] == LAYOUT
    assert all(region.hva % (2 << 20) == 0 for region in memory.regions)
    if memory.backing == "memfd":
        assert [region.fd_offset for region in memory.regions] == [0, 4 * PAGE, 6 * PAGE]
        memory.write(5 * PAGE + 3, b"shared")
        assert os.pread(memory.regions[1].fd, 6, 4 * PAGE + 3) == b"shared"
    else:
        assert {region.fd for region in memory.regions} == {-1}


def test_a_guard_page_stands_on_both_sides(memory: GuestMemory) -> None:
    no_access = {
        tuple(int(part, 16) for part in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.split()[1] == "---p"
    }
    for region in memory.regions:
        assert any(end == region.hva for _, end in no_access)
        assert any(start == region.hva + region.size for start, _ in no_access)


def test_a_file_is_read_straight_into_ram(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789" * 1000)
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_CLOEXEC)
    try:
        memory.read_file(100, fd, 5, 9000)
        assert memory.read(100, 9000) == (b"0123456789" * 1000)[5:9005]
        with pytest.raises(EOFError, match="file ends 995 bytes early"):
            memory.read_file(0, fd, 9000, 1995)
        with pytest.raises(GuestMemoryError):
            memory.read_file(4 * PAGE - 10, fd, 0, 11)
    finally:
        os.close(fd)


def test_after_close_every_access_raises() -> None:
    memory = GuestMemory(PAGE)
    memory.close()
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1])
def test_a_size_that_is_no_multiple_of_a_page_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"guest memory of {size} bytes is not a positive multiple of 4096"):
        GuestMemory(size)


def test_huge_pages_need_multiples_of_2_mib() -> None:
    with pytest.raises(ConfigError, match="multiple of 2097152"):
        GuestMemory(PAGE, backing="hugepages")


def test_an_unknown_backing_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown memory backing 'disk'; choose one of anonymous, memfd, hugepages"):
        GuestMemory(PAGE, backing="disk")


def test_too_many_regions_are_refused() -> None:
    layout = [(2 * n * PAGE, PAGE) for n in range(lib.KVL_MEM_MAX_REGIONS + 1)]
    with pytest.raises(ConfigError, match="9 regions of guest memory; at most 8 fit"):
        GuestMemory(9 * PAGE, layout=layout)


def test_more_than_the_address_space_is_a_host_error() -> None:
    with pytest.raises(HostError, match="cannot map") as caught:
        GuestMemory(1 << 47)
    assert caught.value.hint == "use less memory"
