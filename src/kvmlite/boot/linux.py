"""The 64-bit Linux boot protocol: zero page, page tables, command line, initrd, and the entry state.

Two ways in: a vmlinux (given as such, or unpacked from a bzImage on the host) starts at its e_entry; the
protected-mode code of a bzImage starts at its 64-bit entry and unpacks itself in the guest.
Spec: Linux boot protocol, "64-bit Boot Protocol" (Documentation/arch/x86/boot.rst).
"""

from __future__ import annotations

import os

from kvmlite.abi import layout
from kvmlite.abi import linux_boot as abi
from kvmlite.boot.elf import load_segments, require_entry
from kvmlite.boot.entry import EntryState, read_file, refuse_overlap, require_ram, write_gdt
from kvmlite.boot.memory_map import memory_map
from kvmlite.errors import ConfigError, ImageError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.boot.bzimage import BzImage
    from kvmlite.boot.elf import ElfKernel
    from kvmlite.boot.entry import Ram
    from kvmlite.boot.initrd import Initrd

_TAKEN = (
    ("boot GDT", layout.BOOT_GDT, layout.BOOT_GDT_SIZE),
    ("zero page", layout.ZERO_PAGE, abi.BOOT_PARAMS_SIZE),
    ("page tables", layout.PAGE_TABLES, layout.PAGE_TABLES_END - layout.PAGE_TABLES),
    ("setup data", layout.SETUP_DATA, layout.PAGE_SIZE),
    ("command line", layout.CMDLINE, layout.CMDLINE_MAX_SIZE),
    ("ACPI tables", layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES),
)
_PRESENT_WRITABLE = 0x3
_LARGE_PAGE = 0x80
_VMLINUX_CMDLINE_SIZE = 2047  # COMMAND_LINE_SIZE of x86 is 2048 with the NUL
_INITRD_ADDR_MAX = 0x7FFFFFFF
_SEED_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LinuxInput:
    """What a Linux kernel is given besides itself.

    Attributes:
        cmdline: Without the terminating NUL, checked for NUL and newline.
        initrd: Or None.
        acpi_rsdp: GPA of the RSDP; 0 without ACPI.
    """

    cmdline: bytes = b""
    initrd: Initrd | None = None
    acpi_rsdp: int = 0


def load_vmlinux(
    memory: Ram,
    fd: int,
    kernel: ElfKernel,
    path: str,
    given: LinuxInput,
    *,
    bzimage: BzImage | None = None,
) -> EntryState:
    """Load a vmlinux and enter it at its 64-bit entry.

    Args:
        memory: Guest RAM.
        fd: The vmlinux.
        kernel: Its parsed headers.
        path: Its name, for messages.
        given: Command line, initrd, ACPI.
        bzimage: The bzImage it was unpacked from: its setup header goes into the zero page. None makes one up.

    Raises:
        ImageError: not a 64-bit kernel, or its entry is outside its segments.
        ConfigError: it or its initrd does not fit in the guest's RAM, or the command line is too long.
    """
    if kernel.bits != 64:
        raise ImageError(f"{path}: is a 32-bit ELF; the Linux boot protocol here needs a 64-bit vmlinux")
    require_entry(kernel, kernel.entry, path, "entry")
    start = kernel.segments[0].paddr
    header = _synthetic_header(start, kernel.end) if bzimage is None else bzimage.header
    # Not init_size: that is for unpacking itself. p_memsz has all a running kernel needs (.bss and .brk).
    end = kernel.end
    _check_cmdline(given.cmdline, _VMLINUX_CMDLINE_SIZE if bzimage is None else bzimage.cmdline_size)
    require_ram(memory, start, end - start, f"{path}: the kernel")
    load_segments(memory, fd, kernel, path, _TAKEN)
    limit = _INITRD_ADDR_MAX if bzimage is None else bzimage.initrd_addr_max
    return _enter(memory, kernel.entry, header, given, floor=end, initrd_limit=limit + 1)


def load_bzimage(memory: Ram, fd: int, bzimage: BzImage, path: str, given: LinuxInput) -> EntryState:
    """Load the protected-mode code of a bzImage; the guest unpacks the kernel (and may move it: KASLR).

    Args:
        memory: Guest RAM.
        fd: The bzImage.
        bzimage: Its checked setup header.
        path: Its name, for messages.
        given: Command line, initrd, ACPI.

    Raises:
        ConfigError: it or its initrd does not fit in the guest's RAM, or the command line is too long.
    """
    _check_cmdline(given.cmdline, bzimage.cmdline_size)
    # Where it runs in the end, so that it need not move itself out of the way first.
    gpa = bzimage.pref_address if bzimage.is_relocatable else layout.KERNEL
    end = max(gpa, bzimage.pref_address) + bzimage.init_size
    require_ram(memory, gpa, end - gpa, f"{path}: the kernel")
    refuse_overlap(f"{path}: its code", gpa, bzimage.code_size, _TAKEN)
    read_file(memory, gpa, fd, bzimage.code_offset, bzimage.code_size, path)
    header = bytearray(bzimage.header)
    _put(header, abi.CODE32_START - abi.SETUP_HEADER, gpa, 4)
    limit = bzimage.initrd_addr_max + 1
    return _enter(memory, gpa + abi.ENTRY_64, bytes(header), given, floor=end, initrd_limit=limit)


def _check_cmdline(cmdline: bytes, kernel_limit: int) -> None:
    limit = min(kernel_limit, layout.CMDLINE_MAX_SIZE - 1)
    if len(cmdline) > limit:
        raise ConfigError(
            f"command line of {len(cmdline)} bytes, this kernel takes {limit}",
            hint="shorten the kernel arguments",
        )


def _enter(memory: Ram, entry: int, header: bytes, given: LinuxInput, *, floor: int, initrd_limit: int) -> EntryState:
    """Write everything around the kernel and say how it is entered."""
    initrd_gpa = initrd_size = 0
    if given.initrd is not None:
        initrd_size = given.initrd.size
        initrd_gpa = given.initrd.place(memory, floor=floor, limit=min(initrd_limit, layout.HOLE_START))
        given.initrd.load(memory, initrd_gpa)
    memory.write(layout.CMDLINE, given.cmdline + b"\0")
    # A seed: the guest's random number generator is ready before its first user (Linux 5.20 and later credit it).
    seed = os.urandom(_SEED_SIZE)
    memory.write(layout.SETUP_DATA, abi.SETUP_DATA.pack(0, abi.SETUP_RNG_SEED, len(seed)) + seed)
    page = _zero_page(memory, header, given.acpi_rsdp, initrd_gpa, initrd_size)
    memory.write(layout.ZERO_PAGE, page)
    write_gdt(memory, "long64")
    memory.write(layout.PAGE_TABLES, identity_page_tables(layout.PAGE_TABLES))
    return EntryState(
        mode="long64",
        rip=entry,
        registers={"rsi": layout.ZERO_PAGE, "rsp": layout.BOOT_STACK},
        page_table=layout.PAGE_TABLES,
    )


def _zero_page(memory: Ram, header: bytes, acpi_rsdp: int, initrd_gpa: int, initrd_size: int) -> bytes:
    page = bytearray(abi.BOOT_PARAMS_SIZE)
    page[abi.SETUP_HEADER : abi.SETUP_HEADER + len(header)] = header
    page[abi.TYPE_OF_LOADER] = abi.LOADER_UNDEFINED
    # KASLR_FLAG says that the loader chose a random address: it did not.
    page[abi.LOADFLAGS] = page[abi.LOADFLAGS] & ~abi.KASLR_FLAG | abi.LOADED_HIGH
    _put(page, abi.VID_MODE, 0xFFFF, 2)
    _put(page, abi.CMD_LINE_PTR, layout.CMDLINE, 4)
    _put(page, abi.HARDWARE_SUBARCH, abi.X86_SUBARCH_PC, 4)
    _put(page, abi.SETUP_DATA_PTR, layout.SETUP_DATA, 8)
    _put(page, abi.ACPI_RSDP_ADDR, acpi_rsdp, 8)
    _put(page, abi.RAMDISK_IMAGE, initrd_gpa & 0xFFFFFFFF, 4)
    _put(page, abi.RAMDISK_SIZE, initrd_size & 0xFFFFFFFF, 4)
    _put(page, abi.EXT_RAMDISK_IMAGE, initrd_gpa >> 32, 4)
    _put(page, abi.EXT_RAMDISK_SIZE, initrd_size >> 32, 4)
    ranges = memory_map(memory)[: abi.E820_MAX_ENTRIES_ZEROPAGE]
    page[abi.E820_ENTRIES] = len(ranges)
    for index, (gpa, size, kind) in enumerate(ranges):
        abi.BOOT_E820_ENTRY.pack_into(page, abi.E820_TABLE + index * abi.BOOT_E820_ENTRY.size, gpa, size, kind)
    return bytes(page)


def _synthetic_header(start: int, end: int) -> bytes:
    """The setup header of a vmlinux that came without one: what its bzImage would have said."""
    header = bytearray(abi.INIT_SIZE + 4 + 8 - abi.SETUP_HEADER)

    def put(offset: int, value: int, size: int) -> None:
        _put(header, offset - abi.SETUP_HEADER, value, size)

    put(abi.ROOT_FLAGS, 1, 2)
    put(abi.BOOT_FLAG, abi.BOOT_FLAG_MAGIC, 2)
    put(abi.HEADER, int.from_bytes(abi.HDRS_MAGIC, "little"), 4)
    put(abi.VERSION, abi.PROTOCOL_2_15, 2)
    put(abi.CODE32_START, start, 4)
    put(abi.INITRD_ADDR_MAX, _INITRD_ADDR_MAX, 4)
    put(abi.KERNEL_ALIGNMENT, 0x200000, 4)
    put(abi.RELOCATABLE_KERNEL, 1, 1)
    put(abi.XLOADFLAGS, abi.XLF_KERNEL_64, 2)
    put(abi.CMDLINE_SIZE, _VMLINUX_CMDLINE_SIZE, 4)
    put(abi.PREF_ADDRESS, start, 8)
    put(abi.INIT_SIZE, (end - start) & 0xFFFFFFFF, 4)
    return bytes(header)


def identity_page_tables(gpa: int) -> bytes:
    """Page tables that map the first 4 GiB onto themselves in 2 MiB pages, writable.

    Returns:
        Six pages for ``gpa``: PML4, PDPT, four page directories; le64 entries.
    """
    from struct import pack

    pages = 4 * 512
    pml4 = pack("<Q", gpa + 0x1000 | _PRESENT_WRITABLE).ljust(4096, b"\0")
    pdpt = pack("<4Q", *[gpa + 0x2000 + i * 4096 | _PRESENT_WRITABLE for i in range(4)]).ljust(4096, b"\0")
    flags = _PRESENT_WRITABLE | _LARGE_PAGE
    return pml4 + pdpt + pack(f"<{pages}Q", *[(i << 21) | flags for i in range(pages)])


def _put(buffer: bytearray, offset: int, value: int, size: int) -> None:
    buffer[offset : offset + size] = value.to_bytes(size, "little")
