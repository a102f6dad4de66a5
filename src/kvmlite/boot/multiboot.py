"""Multiboot 1: small kernels and hypervisors, as 32-bit or 64-bit ELF or flat with load addresses in the header.

Spec: Multiboot Specification 0.6.96, 3.1 (header), 3.2 (machine state), 3.3 (information).
"""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.abi import multiboot as abi
from kvmlite.boot.elf import load_segments
from kvmlite.boot.entry import (
    EntryState,
    mebibytes,
    read_file,
    refuse_overlap,
    require_ram,
    write_gdt,
)
from kvmlite.boot.memory_map import memory_map
from kvmlite.errors import ConfigError, ImageError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.boot.elf import ElfKernel
    from kvmlite.boot.entry import Ram
    from kvmlite.boot.image import KernelImage
    from kvmlite.boot.initrd import Initrd

_UNDERSTOOD = abi.MULTIBOOT_PAGE_ALIGN | abi.MULTIBOOT_MEMORY_INFO | abi.MULTIBOOT_VIDEO_MODE
_MODULES = layout.MULTIBOOT_INFO + 0x80
_LOADER_NAME = layout.MULTIBOOT_INFO + 0xA0
_MEMORY_MAP = layout.MULTIBOOT_INFO + 0xC0
_MAX_RANGES = (layout.MULTIBOOT_INFO_SIZE - 0xC0) // abi.MULTIBOOT_MMAP_ENTRY.size
_LIMIT = 1 << 32  # a 32-bit entry reaches no further


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatAddresses:
    """The a.out kludge: physical addresses; an end of 0 means the end of the file or no .bss."""

    header: int
    load: int
    load_end: int
    bss_end: int
    entry: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MultibootHeader:
    """A multiboot header at ``offset`` of the file; ``addresses`` only if its flags say they count."""

    offset: int
    flags: int
    addresses: FlatAddresses | None


def find_header(head: bytes) -> MultibootHeader | None:
    """Look for a multiboot header in the first 8 KiB of a file; None if there is none."""
    head = head[: abi.MULTIBOOT_SEARCH]
    magic = abi.MULTIBOOT_HEADER_MAGIC.to_bytes(4, "little")
    at = head.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + abi.MULTIBOOT_HEADER.size <= len(head):
            values = abi.MULTIBOOT_HEADER.unpack_from(head, at)
            if sum(values) & 0xFFFFFFFF == 0:
                return MultibootHeader(offset=at, flags=values[1], addresses=_addresses(head, at, values[1]))
        at = head.find(magic, at + 1)
    return None


def _addresses(head: bytes, at: int, flags: int) -> FlatAddresses | None:
    at += abi.MULTIBOOT_HEADER.size
    if not flags & abi.MULTIBOOT_AOUT_KLUDGE or at + abi.MULTIBOOT_ADDRESSES.size > len(head):
        return None
    header, load, load_end, bss_end, entry = abi.MULTIBOOT_ADDRESSES.unpack_from(head, at)
    return FlatAddresses(header=header, load=load, load_end=load_end, bss_end=bss_end, entry=entry)


def load_multiboot(
    memory: Ram,
    image: KernelImage,
    header: MultibootHeader,
    *,
    cmdline: bytes = b"",
    initrd: Initrd | None = None,
) -> EntryState:
    """Load a multiboot kernel and the information structure its entry expects.

    Args:
        memory: Guest RAM.
        image: The kernel.
        header: Its multiboot header.
        cmdline: Command line without the terminating NUL, already checked.
        initrd: The one module, or None.

    Raises:
        ImageError: impossible load addresses, or a feature of the loader that kvmlite lacks.
        ConfigError: the guest has not enough RAM, or the command line is too long.
    """
    unknown = header.flags & 0xFFFF & ~_UNDERSTOOD
    if unknown:
        raise ImageError(f"{image.path}: its multiboot header demands flags {unknown:#x} that kvmlite does not know")
    if len(cmdline) >= layout.CMDLINE_MAX_SIZE:
        raise ConfigError(f"command line of {len(cmdline)} bytes, at most {layout.CMDLINE_MAX_SIZE - 1} fit")
    taken = [
        ("boot GDT", layout.BOOT_GDT, layout.BOOT_GDT_SIZE),
        ("multiboot information", layout.MULTIBOOT_INFO, layout.MULTIBOOT_INFO_SIZE),
        ("command line", layout.CMDLINE, len(cmdline) + 1),
    ]
    if header.addresses is not None:
        entry, end = _load_flat(memory, image, header, header.addresses, taken)
    elif image.elf is not None:
        entry, end = _load_elf(memory, image, image.elf, taken)
    else:
        raise ImageError(f"{image.path}: has a multiboot header, but is no ELF and gives no load addresses")
    module = b""
    if initrd is not None:
        gpa = initrd.place(memory, floor=end, limit=layout.HOLE_START)
        initrd.load(memory, gpa)
        module = abi.MULTIBOOT_MOD_LIST.pack(gpa, gpa + initrd.size, 0, 0)
    memory.write(layout.CMDLINE, cmdline + b"\0")
    memory.write(layout.MULTIBOOT_INFO, _information(memory, module))
    write_gdt(memory, "protected32")
    return EntryState(
        mode="protected32",
        rip=entry,
        registers={"rax": abi.MULTIBOOT_BOOTLOADER_MAGIC, "rbx": layout.MULTIBOOT_INFO},
    )


def _load_elf(memory: Ram, image: KernelImage, kernel: ElfKernel, taken: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Load an ELF; returns the physical entry and the first address after the kernel."""
    if kernel.end > _LIMIT:
        raise ImageError(f"{image.path}: ends at {kernel.end:#x}; multiboot reaches the first 4 GiB only")
    entry = None
    for segment in kernel.segments:
        # e_entry is virtual where the kernel is linked high: the segment says what that is physically.
        if 0 <= kernel.entry - segment.vaddr < segment.file_size:
            entry = kernel.entry - segment.vaddr + segment.paddr
    if entry is None:
        if not kernel.has(kernel.entry):
            raise ImageError(f"{image.path}: entry {kernel.entry:#x} lies outside its segments")
        entry = kernel.entry
    load_segments(memory, image.fd, kernel, image.path, taken)
    return entry, kernel.end


def _load_flat(
    memory: Ram,
    image: KernelImage,
    header: MultibootHeader,
    addresses: FlatAddresses,
    taken: list[tuple[str, int, int]],
) -> tuple[int, int]:
    """Load by the addresses in the header; returns the entry and the first address after the kernel."""
    path, load = image.path, addresses.load
    offset = header.offset - (addresses.header - load)
    if load > addresses.header or offset < 0:
        raise ImageError(
            f"{path}: multiboot header at byte {header.offset} says it is loaded at {addresses.header:#x} "
            f"and the image at {load:#x}: that is before the file"
        )
    size = addresses.load_end - load if addresses.load_end else image.size - offset
    if size <= 0 or offset + size > image.size:
        raise ImageError(
            f"{path}: multiboot load addresses {load:#x}-{addresses.load_end:#x} want {mebibytes(max(size, 0))} "
            f"from byte {offset} of a file of {image.size}"
        )
    end = max(load + size, addresses.bss_end)
    if end > _LIMIT:
        raise ImageError(f"{path}: ends at {end:#x}; multiboot reaches the first 4 GiB only")
    if not load <= addresses.entry < load + size:
        raise ImageError(f"{path}: entry {addresses.entry:#x} lies outside {load:#x}-{load + size:#x}")
    refuse_overlap(f"{path}: the kernel", load, end - load, taken)
    require_ram(memory, load, end - load, f"{path}: the kernel")
    read_file(memory, load, image.fd, offset, size, path)
    return addresses.entry, end


def _information(memory: Ram, module: bytes) -> bytes:
    """The information structure with everything it points to, one page for ``layout.MULTIBOOT_INFO``."""
    ranges = memory_map(memory)[:_MAX_RANGES]
    table = b"".join([abi.MULTIBOOT_MMAP_ENTRY.pack(20, gpa, size, kind) for gpa, size, kind in ranges])
    upper = next((size for gpa, size, _ in ranges if gpa == layout.HIGH_RAM), 0)
    flags = (
        abi.MULTIBOOT_INFO_MEMORY
        | abi.MULTIBOOT_INFO_CMDLINE
        | abi.MULTIBOOT_INFO_MODS
        | abi.MULTIBOOT_INFO_MEM_MAP
        | abi.MULTIBOOT_INFO_BOOT_LOADER_NAME
    )
    info = abi.MULTIBOOT_INFO.pack(
        flags,
        layout.EBDA >> 10,
        upper >> 10,
        0,
        layout.CMDLINE,
        1 if module else 0,
        _MODULES if module else 0,
        len(table),
        _MEMORY_MAP,
        0,
        0,
        0,
        _LOADER_NAME,
        0,
    )
    return info.ljust(0x80, b"\0") + module.ljust(0x20, b"\0") + b"kvmlite\0".ljust(0x20, b"\0") + table
