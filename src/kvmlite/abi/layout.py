"""The guest-physical map, in plain numbers (docs/architecture.md); the one home of these addresses. Bytes."""

from __future__ import annotations

from kvmlite.records import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096

# Boot structures in low RAM
BOOT_GDT = 0x500
BOOT_GDT_SIZE = 32
BOOT_IDT = 0x520
BOOT_CODE_SELECTOR = 0x10  # __BOOT_CS
BOOT_DATA_SELECTOR = 0x18  # __BOOT_DS
PVH_START_INFO = 0x6000
PVH_START_INFO_SIZE = 0x1000
ZERO_PAGE = 0x7000
MULTIBOOT_INFO = 0x7000
MULTIBOOT_INFO_SIZE = 0x1000
BOOT_STACK = 0x8FF0
PAGE_TABLES = 0x9000
PAGE_TABLES_END = 0xF000
SETUP_DATA = 0xF000  # one page: setup_data nodes (the seed of the guest's random number generator)
CMDLINE = 0x20000
CMDLINE_MAX_SIZE = 0x10000  # with the terminating NUL

# Low RAM and what is above it
EBDA = 0x9FC00
ACPI_TABLES = 0xE0000
RESET_VECTOR = 0xFFFF0  # where a guest jumps in real mode to have the BIOS reboot
ACPI_TABLES_END = 0x100000
HIGH_RAM = 0x100000
KERNEL = 0x100000
HOLE_START = 0xC0000000
HOLE_END = 0x100000000

# Devices in the hole
VIRTIO_MMIO = 0xD0000000
VIRTIO_MMIO_STEP = 0x2000
VIRTIO_MMIO_SIZE = 0x1000
VIRTIO_MMIO_REGISTERS_SIZE = 0x100  # they end a page, configuration space begins the next
VIRTIO_MMIO_FIRST_GSI = 5
VIRTIO_MMIO_MAX_DEVICES = 19
IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000
IDENTITY_MAP = 0xFFFBC000
TSS = 0xFFFBD000

# Ports
COM1_PORT = 0x3F8
COM1_GSI = 4
COM2_PORT = 0x2F8
COM2_GSI = 3
DEBUG_EXIT_PORT = 0xF4
ACPI_SLEEP_CONTROL_PORT = 0x600
ACPI_SLEEP_STATUS_PORT = 0x601
ACPI_RESET_PORT = 0x604
ACPI_RESET_VALUE = 1
ACPI_POWER_OFF_VALUE = 0x34  # to the sleep control port: SLP_EN (bit 5) and SLP_TYP 5 (bits 2-4), as \_S5 says


@dataclass(frozen=True, slots=True, kw_only=True)
class MmioWindow:
    """Where the driver finds a virtio-mmio device: its registers (GPA, bytes) and its interrupt line.

    The registers are the end of the page at ``page_gpa``, which the guest may read as memory (ADR 9); configuration space
    is the beginning of the next page.
    """

    page_gpa: int
    gpa: int
    size: int
    gsi: int


def virtio_mmio_window(index: int) -> MmioWindow:
    """Window of the virtio-mmio device number ``index``, counted from 0.

    Raises:
        ValueError: no such window; the caller checks the number of devices first.
    """
    if not 0 <= index < VIRTIO_MMIO_MAX_DEVICES:
        raise ValueError(f"virtio-mmio device {index} outside 0..{VIRTIO_MMIO_MAX_DEVICES - 1}")
    page_gpa = VIRTIO_MMIO + index * VIRTIO_MMIO_STEP
    return MmioWindow(
        page_gpa=page_gpa,
        gpa=page_gpa + PAGE_SIZE - VIRTIO_MMIO_REGISTERS_SIZE,
        size=VIRTIO_MMIO_SIZE,
        gsi=VIRTIO_MMIO_FIRST_GSI + index,
    )
