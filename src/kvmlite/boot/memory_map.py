"""The memory map the guest is told: E820 numbers, used alike by Linux, PVH and multiboot."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.abi.linux_boot import E820_RAM, E820_RESERVED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.boot.entry import Ram


def memory_map(memory: Ram) -> list[tuple[int, int, int]]:
    """Ranges the guest is told of, ascending: (GPA, bytes, E820 type).

    RAM is what the regions hold, without 0x9fc00-0xfffff: that is the EBDA and the VGA and BIOS area of a PC,
    where the ACPI tables are, marked reserved.
    """
    ranges: list[tuple[int, int, int]] = []
    for region in sorted(memory.regions, key=lambda region: region.gpa):
        start, end = region.gpa, region.gpa + region.size
        if start < layout.EBDA:
            ranges.append((start, min(end, layout.EBDA) - start, E820_RAM))
        if start < layout.HIGH_RAM and end > layout.ACPI_TABLES:
            size = min(end, layout.ACPI_TABLES_END) - layout.ACPI_TABLES
            ranges.append((layout.ACPI_TABLES, size, E820_RESERVED))
        if end > layout.HIGH_RAM:
            start = max(start, layout.HIGH_RAM)
            ranges.append((start, end - start, E820_RAM))
    return ranges
