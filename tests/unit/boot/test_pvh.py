from __future__ import annotations

import pytest

from kvmlite.boot import EntryState, load_kernel, open_kernel
from kvmlite.errors import ConfigError, ImageError


def test_entry_is_32_bit_with_the_start_info_in_ebx(save, build, memory):
    with open_kernel(save(build.pvh())) as image:
        entry = load_kernel(memory, image)
    assert entry == EntryState(mode="protected32", rip=0x100000, registers={"rbx": 0x6000}, page_table=0)


def test_start_info_without_extras(save, build, memory):
    with open_kernel(save(build.pvh())) as image:
        load_kernel(memory, image)
    assert memory.read(0x6000, 56) == bytes.fromhex(
        "78c56e33 01000000 00000000 00000000"  # magic, version 1, flags, no modules
        "0000000000000000 0000000000000000 0000000000000000"  # module list, command line, RSDP
        "6060000000000000 03000000 00000000"  # memory map at 0x6060, three entries
    )


def test_memory_map_leaves_out_the_bios_area(save, build, memory):
    with open_kernel(save(build.pvh())) as image:
        load_kernel(memory, image)
    assert memory.read(0x6060, 72) == bytes.fromhex(
        "0000000000000000 00fc090000000000 01000000 00000000"
        "00000e0000000000 0000020000000000 02000000 00000000"
        "0000100000000000 0000f00100000000 01000000 00000000"
    )


def test_command_line_initrd_and_rsdp_are_passed(save, build, memory):
    with open_kernel(save(build.pvh())) as image:
        load_kernel(memory, image, cmdline="a=b", initrd=b"initrd", acpi_rsdp=0xE0000)
    assert memory.read(0x600C, 28) == bytes.fromhex("01000000 4060000000000000 0000020000000000 00000e0000000000")
    assert memory.read(0x6040, 32) == bytes.fromhex(
        "00f0ff0100000000 0600000000000000 0000000000000000 0000000000000000"
    )
    assert memory.read(0x20000, 4) == b"a=b\0"
    assert memory.read(0x1FFF000, 7) == b"initrd\0"


def test_gdt_has_flat_32_bit_segments(save, build, memory):
    with open_kernel(save(build.pvh())) as image:
        load_kernel(memory, image)
    assert memory.read(0x500, 32) == bytes(16) + bytes.fromhex("ffff0000009bcf00 ffff00000093cf00")


def test_entry_outside_the_segments_is_refused(save, build, memory):
    data = build.elf([(0x100000, 0, b"\xf4", 4096)], entry=0, notes=build.note(b"Xen", 18, b"\x01\x00\x10\x00"))
    with (
        open_kernel(save(data)) as image,
        pytest.raises(ImageError, match="PVH entry 0x100001 lies outside"),
    ):
        load_kernel(memory, image)


@pytest.mark.parametrize(
    ("paddr", "options", "name"),
    [
        (0x4F8, {}, "boot GDT at 0x500-0x520"),
        (0x6FFF, {}, "PVH start info at 0x6000-0x7000"),
        (0x20001, {"cmdline": "xy"}, "command line at 0x20000-0x20003"),
        (0xF0000, {"acpi_rsdp": 0xE0000}, "ACPI tables at 0xe0000-0x100000"),
    ],
)
def test_kernel_on_a_structure_of_the_loader_is_refused(save, build, memory, paddr, options, name):
    with (
        open_kernel(save(build.pvh(paddr=paddr, entry=paddr))) as image,
        pytest.raises(ImageError, match=name),
    ):
        load_kernel(memory, image, **options)


def test_kernel_in_low_memory_beside_the_structures_loads(save, build, make_memory):
    memory = make_memory(layout=[(0, 0x8000)])
    with open_kernel(save(build.pvh(paddr=0x1000, entry=0x1000))) as image:
        assert load_kernel(memory, image).rip == 0x1000
    assert memory.read(0x6060, 24) == bytes.fromhex("0000000000000000 0080000000000000 01000000 00000000")


def test_linux_protocol_is_refused_for_a_kernel_that_is_not_linux(save, build, memory):
    with (
        open_kernel(save(build.pvh(bits=32))) as image,
        pytest.raises(ImageError, match="is a 32-bit ELF"),
    ):
        load_kernel(memory, image, protocol="linux")


def test_multiboot_protocol_is_refused_without_a_header(save, build, memory):
    with open_kernel(save(build.pvh())) as image, pytest.raises(ImageError) as refused:
        load_kernel(memory, image, protocol="multiboot")
    assert str(refused.value).endswith("cannot be started by the multiboot protocol")
    assert refused.value.hint == "it offers: pvh"


def test_pvh_protocol_without_the_note_names_the_kernel_option(save, build, memory):
    with open_kernel(save(build.vmlinux())) as image, pytest.raises(ImageError) as refused:
        load_kernel(memory, image, protocol="pvh")
    assert "CONFIG_PVH" in refused.value.hint


def test_unknown_protocol_is_refused(save, build, memory):
    with (
        open_kernel(save(build.pvh())) as image,
        pytest.raises(ConfigError, match="unknown boot protocol 'efi'"),
    ):
        load_kernel(memory, image, protocol="efi")


def test_command_line_longer_than_its_place_is_refused(save, build, memory):
    with (
        open_kernel(save(build.pvh())) as image,
        pytest.raises(ConfigError, match="65536 bytes, at most 65535"),
    ):
        load_kernel(memory, image, cmdline="x" * 65536)
