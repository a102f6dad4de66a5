from __future__ import annotations

import struct

import pytest

from kvmlite.boot import EntryState, load_kernel, open_kernel
from kvmlite.boot.linux import identity_page_tables
from kvmlite.errors import ConfigError, ImageError

MIB = 1 << 20


def load(path, memory, **options):
    with open_kernel(path) as image:
        return load_kernel(memory, image, **options)


def le(memory, gpa, size):
    return int.from_bytes(memory.read(gpa, size), "little")


def test_vmlinux_is_entered_in_64_bits_with_the_zero_page_in_rsi(save, build, memory):
    assert load(save(build.vmlinux()), memory) == EntryState(
        mode="long64", rip=0x1000000, registers={"rsi": 0x7000, "rsp": 0x8FF0}, page_table=0x9000
    )
    assert memory.read(0x1000000, 64) == b"\x90" * 64


def test_bzimage_is_unpacked_and_entered_like_its_vmlinux(save, build, memory, tmp_path):
    entry = load(save(build.bzimage()), memory, cache_dir=tmp_path / "cache")
    assert (entry.mode, entry.rip) == ("long64", 0x1000000)
    assert memory.read(0x1000000, 64) == b"\x90" * 64


def test_bzimage_left_packed_is_entered_at_its_64_bit_entry(save, build, memory):
    assert load(save(build.bzimage()), memory, unpack=False).rip == 0x1000200
    assert memory.read(0x1000000, 4) == b"\xcc" * 4
    assert le(memory, 0x7214, 4) == 0x1000000  # code32_start


def test_zero_page_of_a_bzimage_has_its_setup_header(save, build, memory):
    load(save(build.bzimage()), memory, cmdline="quiet", acpi_rsdp=0xE0000)
    assert memory.read(0x71FE, 10) == bytes.fromhex("55aa eb6a") + b"HdrS" + b"\x0f\x02"
    assert memory.read(0x7210, 2) == b"\xff\x01"  # type_of_loader, loadflags LOADED_HIGH
    assert le(memory, 0x7228, 4) == 0x20000  # cmd_line_ptr
    assert le(memory, 0x7258, 8) == 0x1000000  # pref_address
    assert le(memory, 0x7070, 8) == 0xE0000  # acpi_rsdp_addr
    assert memory.read(0x7000, 0x70) == bytes(0x70)
    assert memory.read(0x20000, 6) == b"quiet\0"


def test_zero_page_of_a_bare_vmlinux_is_made_up(save, build, memory):
    load(save(build.vmlinux()), memory)
    assert memory.read(0x71FE, 10) == bytes.fromhex("55aa 0000") + b"HdrS" + b"\x0f\x02"
    assert le(memory, 0x722C, 4) == 0x7FFFFFFF  # initrd_addr_max
    assert le(memory, 0x7238, 4) == 2047  # cmdline_size
    assert le(memory, 0x7260, 4) == 0x2000  # init_size


def test_memory_map_with_the_hole(save, build, make_memory):
    memory = make_memory(layout=[(0, 64 * MIB), (1 << 32, 2 * MIB)])
    load(save(build.vmlinux()), memory)
    assert memory.read(0x71E8, 1) == b"\x04"
    assert memory.read(0x72D0, 80) == bytes.fromhex(
        "0000000000000000 00fc090000000000 01000000"
        "00000e0000000000 0000020000000000 02000000"
        "0000100000000000 0000f00300000000 01000000"
        "0000000001000000 0000200000000000 01000000"
    )


def test_seed_is_chained_as_setup_data_and_differs_each_time(save, build, make_memory):
    path, seeds = save(build.vmlinux()), set()
    for _ in range(2):
        memory = make_memory(32)
        load(path, memory)
        assert le(memory, 0x7250, 8) == 0xF000
        assert memory.read(0xF000, 16) == bytes.fromhex("0000000000000000 09000000 20000000")
        seeds.add(memory.read(0xF010, 32))
    assert len(seeds) == 2
    assert bytes(32) not in seeds


def test_gdt_has_a_64_bit_code_segment(save, build, memory):
    load(save(build.vmlinux()), memory)
    assert memory.read(0x500, 32) == bytes(16) + bytes.fromhex("ffff0000009baf00 ffff00000093cf00")


def test_page_tables_map_4_gib_onto_themselves(save, build, memory):
    load(save(build.vmlinux()), memory)
    assert memory.read(0x9000, 16) == struct.pack("<QQ", 0xA003, 0)
    assert memory.read(0xA000, 40) == struct.pack("<5Q", 0xB003, 0xC003, 0xD003, 0xE003, 0)
    assert memory.read(0xB000, 24) == struct.pack("<3Q", 0x83, 0x200083, 0x400083)
    assert memory.read(0xEFF8, 8) == struct.pack("<Q", 0xFFE00083)
    assert len(identity_page_tables(0x9000)) == 6 * 4096


def test_initrd_goes_to_the_top_of_low_ram(save, build, make_memory):
    memory = make_memory(layout=[(0, 64 * MIB), (1 << 32, 2 * MIB)])
    load(save(build.vmlinux()), memory, initrd=b"x" * 5000)
    assert le(memory, 0x7218, 4) == 64 * MIB - 8192
    assert le(memory, 0x721C, 4) == 5000
    assert le(memory, 0x70C0, 8) == 0  # ext_ramdisk_image, ext_ramdisk_size
    assert memory.read(64 * MIB - 8192, 5001) == b"x" * 5000 + b"\0"


def test_initrd_stays_below_the_limit_of_the_kernel(save, build, memory):
    load(save(build.bzimage(initrd_addr_max=0x1800FFF)), memory, initrd=b"x" * 10)
    assert le(memory, 0x7218, 4) == 0x1800000


def test_initrd_that_does_not_fit_names_the_memory_needed(save, build, make_memory):
    with pytest.raises(ConfigError) as refused:
        load(save(build.vmlinux()), make_memory(20), initrd=bytes(5 * MIB))
    assert "of 5 MiB does not fit between the kernel (ends at 0x1002000) and 0x1400000" in str(refused.value)
    assert refused.value.hint == "give the guest more memory: --memory 32M"


def test_initrd_above_the_limit_of_the_kernel_says_so(save, build, memory):
    with pytest.raises(ConfigError) as refused:
        load(save(build.bzimage(initrd_addr_max=0x1003FFF)), memory, initrd=bytes(MIB))
    assert refused.value.hint == "this kernel takes initrds below 0x1004000 only: make the initrd smaller"


def test_initrd_of_a_packed_kernel_is_clear_of_where_it_unpacks(save, build, make_memory):
    path = save(build.bzimage(init_size=8 * MIB))
    with pytest.raises(ConfigError, match=r"kernel \(ends at 0x1800000"):
        load(path, make_memory(25), initrd=bytes(2 * MIB), unpack=False)


def test_packed_kernel_needs_the_memory_to_unpack(save, build, make_memory):
    path = save(build.bzimage(init_size=8 * MIB))
    with pytest.raises(ConfigError, match="the kernel needs RAM at 0x1000000-0x1800000, but the guest has 20 MiB"):
        load(path, make_memory(20), unpack=False)


def test_command_line_longer_than_the_kernel_takes_names_both_sizes(save, build, memory):
    path = save(build.bzimage(cmdline_size=255))
    load(path, memory, cmdline="x" * 255)
    with pytest.raises(ConfigError, match="command line of 256 bytes, this kernel takes 255"):
        load(path, memory, cmdline="x" * 256)


@pytest.mark.parametrize("cmdline", ["a\0b", "a\nb", b"a\rb"])
def test_command_line_with_a_control_character_is_refused(save, build, memory, cmdline):
    with pytest.raises(ConfigError, match="at offset 1"):
        load(save(build.vmlinux()), memory, cmdline=cmdline)


def test_vmlinux_with_its_entry_outside_is_refused(save, build, memory):
    data = build.elf([(0x1000000, 0, b"x", 4096)], entry=0x1000001, notes=build.note(b"Linux", 256, b"1234"))
    with pytest.raises(ImageError, match="entry 0x1000001 lies outside its segments"):
        load(save(data), memory)


def test_vmlinux_on_the_zero_page_is_refused(save, build, memory):
    with pytest.raises(ImageError, match="lies on the zero page at 0x7000-0x8000"):
        load(save(build.vmlinux(paddr=0x6FFF)), memory)
