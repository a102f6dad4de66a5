"""The PVH entry: 32-bit protected mode with EBX pointing at ``hvm_start_info`` (xen/docs/misc/pvh.pandoc)."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.abi import pvh as abi
from kvmlite.boot.elf import load_segments, require_entry
from kvmlite.boot.entry import EntryState, write_gdt
from kvmlite.boot.memory_map import memory_map
from kvmlite.errors import ConfigError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.boot.elf import ElfKernel
    from kvmlite.boot.entry import Ram
    from kvmlite.boot.initrd import Initrd

_MODLIST = layout.PVH_START_INFO + 0x40
_MEMMAP = layout.PVH_START_INFO + 0x60
_MAX_RANGES = (layout.PVH_START_INFO_SIZE - 0x60) // abi.HVM_MEMMAP_TABLE_ENTRY.size


def load_pvh(
    memory: Ram,
    fd: int,
    kernel: ElfKernel,
    path: str,
    *,
    cmdline: bytes = b"",
    initrd: Initrd | None = None,
    acpi_rsdp: int = 0,
) -> EntryState:
    """Load an ELF kernel with a PVH note and the structures its entry expects.

    Args:
        memory: Guest RAM.
        fd: The kernel's file.
        kernel: Its parsed headers.
        path: Its name, for messages.
        cmdline: Command line without the terminating NUL, already checked.
        initrd: The one module, or None.
        acpi_rsdp: GPA of the RSDP; 0 without ACPI.

    Raises:
        ImageError: no PVH entry, or one outside the kernel; the kernel lies on the loader's structures.
        ConfigError: the guest has not enough RAM, or the command line is too long.
    """
    entry = kernel.pvh_entry
    if entry is None:
        raise ImageError(
            f"{path}: has no PVH entry (XEN_ELFNOTE_PHYS32_ENTRY)",
            hint="build Linux with CONFIG_PVH=y, or use another boot protocol",
        )
    require_entry(kernel, entry, path, "PVH entry")
    if len(cmdline) >= layout.CMDLINE_MAX_SIZE:
        raise ConfigError(f"command line of {len(cmdline)} bytes, at most {layout.CMDLINE_MAX_SIZE - 1} fit")
    taken = [
        ("boot GDT", layout.BOOT_GDT, layout.BOOT_GDT_SIZE),
        ("PVH start info", layout.PVH_START_INFO, layout.PVH_START_INFO_SIZE),
        ("command line", layout.CMDLINE, len(cmdline) + 1 if cmdline else 0),
    ]
    if acpi_rsdp:
        taken.append(("ACPI tables", layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES))
    load_segments(memory, fd, kernel, path, taken)
    write_gdt(memory, "protected32")
    if cmdline:
        memory.write(layout.CMDLINE, cmdline + b"\0")
    module = b""
    if initrd is not None:
        gpa = initrd.place(memory, floor=kernel.end, limit=layout.HOLE_START)
        initrd.load(memory, gpa)
        module = abi.HVM_MODLIST_ENTRY.pack(gpa, initrd.size, 0, 0)
    ranges = memory_map(memory)[:_MAX_RANGES]
    info = abi.HVM_START_INFO.pack(
        abi.XEN_HVM_START_MAGIC_VALUE,
        abi.XEN_HVM_START_INFO_VERSION,
        0,
        1 if module else 0,
        _MODLIST if module else 0,
        layout.CMDLINE if cmdline else 0,
        acpi_rsdp,
        _MEMMAP,
        len(ranges),
        0,
    )
    table = b"".join([abi.HVM_MEMMAP_TABLE_ENTRY.pack(gpa, size, kind, 0) for gpa, size, kind in ranges])
    memory.write(layout.PVH_START_INFO, info.ljust(0x40, b"\0") + module.ljust(0x20, b"\0") + table)
    return EntryState(mode="protected32", rip=entry, registers={"rbx": layout.PVH_START_INFO})
