from __future__ import annotations

import struct

import pytest

from kvmlite.boot import load_kernel, open_kernel
from kvmlite.errors import ConfigError, ImageError

HUGE = 2**64 - 1


def patched(data: bytes, offset: int, shape: str, value: int) -> bytes:
    copy = bytearray(data)
    struct.pack_into(shape, copy, offset, value)
    return bytes(copy)


# Offsets into the first program header of an ELF64 (at 64): p_offset 72, p_paddr 88, p_filesz 96, p_memsz 104.
MALFORMED = [
    ("program headers at 2^64-1", 32, "<Q", HUGE, "truncated ELF: program headers"),
    ("program headers beyond the end", 32, "<Q", 100000, "truncated ELF: program headers"),
    ("no program headers", 56, "<H", 0, "without program headers"),
    ("65535 program headers", 56, "<H", 0xFFFF, "65535 program headers"),
    ("program headers of 0 bytes", 54, "<H", 0, "program headers of 0 bytes"),
    ("program headers of 32 bytes", 54, "<H", 32, "program headers of 32 bytes"),
    ("segment at offset 2^64-1", 72, "<Q", HUGE, "truncated ELF: segment 0 ends at byte"),
    ("segment beyond the end", 72, "<Q", 5000, "truncated ELF: segment 0 ends at byte 5016"),
    ("segment of 2^64-1 bytes in the file", 96, "<Q", HUGE, "bytes of file for 0x30 of memory"),
    ("more file than memory", 104, "<Q", 8, "0x10 bytes of file for 0x8 of memory"),
    ("memory of 2^64-1 bytes", 104, "<Q", HUGE, "beyond physical memory"),
    ("physical address that wraps", 88, "<Q", HUGE, "beyond physical memory"),
    ("segment with no memory", 104, "<Q", 0, "nothing to load"),
    ("class 9", 4, "<B", 9, "ELF of class 9"),
    ("byte order 7", 5, "<B", 7, "unknown byte order 7"),
    ("type 9", 16, "<H", 9, "an ELF of type 9"),
]


@pytest.mark.parametrize(("name", "offset", "shape", "value", "message"), MALFORMED, ids=[m[0] for m in MALFORMED])
def test_malformed_elf_is_refused(save, build, name, offset, shape, value, message):
    with pytest.raises(ImageError, match=message):
        open_kernel(save(patched(build.pvh(), offset, shape, value)))


@pytest.mark.parametrize("bits", [32, 64])
def test_elf_cut_anywhere_is_refused(save, build, bits):
    whole = build.elf(
        [(0x100000, 0x100000, b"\xf4" * 16, 16)],
        entry=0x100000,
        notes=build.note(b"Xen", 18, bytes.fromhex("00001000")),
        bits=bits,
    )
    for size in range(len(whole)):
        with pytest.raises(ImageError):
            open_kernel(save(whole[:size]))


def test_overlapping_segments_are_refused(save, build):
    data = build.elf([(0x100000, 0, b"a" * 32, 64), (0x100020, 0, b"b" * 32, 32)], entry=0x100000)
    with pytest.raises(ImageError, match="segments overlap at 0x100020: the one before ends at 0x100040"):
        open_kernel(save(data))


def test_notes_that_overrun_their_segment_are_ignored(save, build):
    good = build.note(b"Xen", 18, bytes.fromhex("00001000"))
    bad = struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0"
    data = build.elf([(0x100000, 0x100000, b"\xf4" * 16, 16)], entry=0x100000, notes=good + bad)
    with open_kernel(save(data)) as image:
        assert len(image.elf.notes) == 1


def test_pvh_note_of_two_bytes_is_no_entry(save, build):
    data = build.elf([(0x100000, 0x100000, b"\xf4" * 16, 16)], entry=0, notes=build.note(b"Xen", 18, b"\0\0"))
    with pytest.raises(ImageError, match="has no PVH note"):
        open_kernel(save(data))


def test_pvh_note_of_another_owner_is_no_entry(save, build):
    data = build.elf([(0x100000, 0x100000, b"\xf4" * 16, 16)], entry=0, notes=build.note(b"GNU", 18, bytes(4)))
    with pytest.raises(ImageError, match="has no PVH note"):
        open_kernel(save(data))


def test_segments_land_at_their_physical_addresses(save, build, memory):
    data = build.elf(
        [(0x200000, 0x7000000, b"second", 6), (0x100000, 0x6000000, b"first", 4096)],
        entry=0x100000,
        notes=build.note(b"Xen", 18, bytes.fromhex("00001000")),
    )
    with open_kernel(save(data)) as image:
        load_kernel(memory, image)
    assert memory.read(0x100000, 8) == b"first\0\0\0"
    assert memory.read(0x200000, 8) == b"second\0\0"


def test_segment_that_does_not_fit_names_the_memory_needed(save, build, make_memory):
    data = build.pvh(paddr=0x3000000, entry=0x3000000)
    with open_kernel(save(data)) as image, pytest.raises(ConfigError) as refused:
        load_kernel(make_memory(32), image)
    assert "segment 0 needs RAM at 0x3000000-0x3000030, but the guest has 32 MiB" in str(refused.value)
    assert refused.value.hint == "give the machine more: --memory 64M"


def test_segment_in_the_32_bit_hole_is_refused(save, build, memory):
    data = build.pvh(paddr=0xD0000000, entry=0xD0000000)
    with (
        open_kernel(save(data)) as image,
        pytest.raises(ConfigError, match="needs RAM at 0xd0000000"),
    ):
        load_kernel(memory, image)


def test_kernel_that_shrinks_after_it_was_opened_is_refused(save, build, memory):
    path = save(build.pvh(code=b"\xf4" * 5000))
    with open_kernel(path) as image:
        with open(path, "r+b") as file:
            file.truncate(2000)
        with pytest.raises(ImageError, match="cannot read 5000 bytes"):
            load_kernel(memory, image)
