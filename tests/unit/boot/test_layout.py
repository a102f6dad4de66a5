from __future__ import annotations

import itertools

import pytest

from kvmlite.abi import layout
from kvmlite.abi.layout import MmioWindow, virtio_mmio_window


def test_virtio_mmio_windows_count_up_from_the_hole_and_gsi_5():
    assert virtio_mmio_window(0) == MmioWindow(page_gpa=0xD0000000, gpa=0xD0000F00, size=0x1000, gsi=5)
    assert virtio_mmio_window(18) == MmioWindow(page_gpa=0xD0024000, gpa=0xD0024F00, size=0x1000, gsi=23)


@pytest.mark.parametrize("index", [-1, 19])
def test_no_window_beyond_the_ioapic(index):
    with pytest.raises(ValueError, match=r"outside 0\.\.18"):
        virtio_mmio_window(index)


def test_boot_structures_do_not_overlap():
    ranges = [
        (layout.BOOT_GDT, layout.BOOT_GDT_SIZE),
        (layout.BOOT_IDT, 0x20),
        (layout.PVH_START_INFO, layout.PVH_START_INFO_SIZE),
        (layout.ZERO_PAGE, 4096),
        (layout.BOOT_STACK - 0xFF0, 0xFF0),
        (layout.PAGE_TABLES, layout.PAGE_TABLES_END - layout.PAGE_TABLES),
        (layout.SETUP_DATA, layout.PAGE_SIZE),
        (layout.CMDLINE, layout.CMDLINE_MAX_SIZE),
        (layout.EBDA, 0),
        (layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES),
        (layout.KERNEL, 0),
    ]
    for (start, size), (following, _) in itertools.pairwise(ranges):
        assert start + size <= following
