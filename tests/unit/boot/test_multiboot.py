from __future__ import annotations

import struct

import pytest

from kvmlite.boot import EntryState, load_kernel, open_kernel
from kvmlite.errors import ConfigError, ImageError

MAGIC = 0x1BADB002


def header(flags: int, *addresses: int) -> bytes:
    return struct.pack("<III", MAGIC, flags, -(MAGIC + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def flat(*, at: int = 0, load: int = 0x100000, load_end: int = 0, bss_end: int = 0, entry: int = 0x100020) -> bytes:
    data = bytes(at) + header(0x10000, 0x100000 + at, load, load_end, bss_end, entry)
    return data + b"\xf4" * 100


def open_and_load(path, memory, **options):
    with open_kernel(path) as image:
        return load_kernel(memory, image, **options)


def test_flat_image_is_loaded_by_the_addresses_of_its_header(save, memory):
    entry = open_and_load(save(flat(at=64)), memory)
    assert entry == EntryState(
        mode="protected32", rip=0x100020, registers={"rax": 0x2BADB002, "rbx": 0x7000}, page_table=0
    )
    assert memory.read(0x100040, 4) == bytes.fromhex("02b0ad1b")
    assert memory.read(0x100060, 4) == b"\xf4" * 4


def test_flat_image_stops_at_its_load_end(save, memory):
    open_and_load(save(flat(load_end=0x100030)), memory)
    assert memory.read(0x100020, 17) == b"\xf4" * 16 + b"\0"


def test_elf32_is_loaded_by_its_segments(save, build, memory):
    data = build.elf([(0x100000, 0x100000, header(3) + b"\xf4" * 20, 4096)], entry=0x10000C, bits=32)
    assert open_and_load(save(data), memory).rip == 0x10000C
    assert memory.read(0x10000C, 2) == b"\xf4\xf4"


def test_virtual_entry_of_an_elf64_becomes_physical(save, build, memory):
    data = build.elf([(0x100000, 0xFFFFFFFFC0100000, header(0) + b"\xf4" * 20, 64)], entry=0xFFFFFFFFC010000C)
    assert open_and_load(save(data), memory).rip == 0x10000C


def test_information_structure(save, memory):
    open_and_load(save(flat()), memory, cmdline="hello", initrd=b"module data")
    assert memory.read(0x7000, 32) == bytes.fromhex(
        "4d020000 7f020000 007c0000 00000000"  # flags, 639 KiB below, 31744 KiB above 1 MiB, boot device
        "00000200 01000000 80700000 00000000"  # command line, one module, module list
    )
    assert memory.read(0x702C, 8) == bytes.fromhex("48000000 c0700000")
    assert memory.read(0x7040, 4) == bytes.fromhex("a0700000")
    assert memory.read(0x7080, 16) == bytes.fromhex("00f0ff01 0bf0ff01 00000000 00000000")
    assert memory.read(0x70A0, 8) == b"kvmlite\0"
    assert memory.read(0x70C0, 24) == bytes.fromhex("14000000 0000000000000000 00fc090000000000 01000000")
    assert memory.read(0x20000, 6) == b"hello\0"
    assert memory.read(0x1FFF000, 11) == b"module data"


def test_header_is_found_at_the_end_of_the_first_8_kib_only(save, memory):
    assert open_and_load(save(flat(at=8192 - 32)), memory).rip == 0x100020
    with pytest.raises(ImageError, match="starts with zeros only"):
        open_kernel(save(flat(at=8192)))


def test_header_off_a_multiple_of_four_is_none(save):
    with pytest.raises(ImageError, match="is not a kernel"):
        open_kernel(save(b"\xfe" + flat()))


def test_header_with_a_wrong_checksum_is_none(save):
    data = bytearray(flat())
    data[8] ^= 1
    with pytest.raises(ImageError, match="is not a kernel"):
        open_kernel(save(bytes(data)))


def test_header_without_addresses_outside_an_elf_is_refused(save):
    with pytest.raises(ImageError, match="is no ELF and gives no load addresses"):
        open_kernel(save(header(3) + b"\xf4" * 100))


def test_unknown_demand_of_the_header_is_refused(save, memory):
    data = header(0x10010, 0x100000, 0x100000, 0, 0, 0x100020) + b"\xf4" * 100
    with pytest.raises(ImageError, match="demands flags 0x10 "):
        open_and_load(save(data), memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load": 0x100001}, "that is before the file"),
        ({"load": 0xFFFFF}, "that is before the file"),
        ({"load_end": 0x100000 + 5000}, "want 4.883 KiB"),
        ({"load_end": 0xFFFFF}, "want 0 bytes"),
        ({"entry": 0xFFFFF}, "entry 0xfffff lies outside 0x100000-"),
        ({"entry": 0x200000}, "entry 0x200000 lies outside 0x100000-"),
    ],
)
def test_impossible_addresses_are_refused(save, memory, options, message):
    with pytest.raises(ImageError, match=message):
        open_and_load(save(flat(**options)), memory)


def test_bss_beyond_ram_is_refused(save, memory):
    with pytest.raises(ConfigError, match="the kernel needs RAM at 0x100000-0xf0000000"):
        open_and_load(save(flat(bss_end=0xF0000000)), memory)


def test_kernel_on_the_information_structure_is_refused(save, memory):
    data = header(0x10000, 0x7000, 0x7000, 0, 0, 0x7020) + b"\xf4" * 100
    with pytest.raises(ImageError, match="multiboot information at 0x7000-0x8000"):
        open_and_load(save(data), memory)
