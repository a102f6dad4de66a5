"""ACPI tables of the machine: hardware-reduced, generated, below 1 MiB.

They name what there is and nothing else: CPUs and the IOAPIC (MADT), reset and power-off registers (FADT), serial
ports and virtio-mmio devices (DSDT). No PCI, no 8042, no RTC, no PIC or PIT, no fixed power hardware. A stock
kernel powers off by the sleep control register and reboots by the reset register. One built with CONFIG_EFI does not
trust hardware-reduced tables that far: on a machine without EFI it reboots as a BIOS would be asked to, by jumping to
0xffff0 in real mode (Linux, efi_reboot_required()). The code we put there writes the reset register.
Spec: ACPI 6.5, 4.1 (hardware-reduced), 5.2 (tables).
"""

from __future__ import annotations

from kvmlite.abi import acpi as abi
from kvmlite.abi import layout
from kvmlite.boot import aml
from kvmlite.boot.entry import require_ram
from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.abi.layout import MmioWindow
    from kvmlite.boot.entry import Ram

_OEM_ID = b"KVMLIT"
_OEM_TABLE_ID = b"KVMLITE "
_CREATOR = b"KVML"
_REVISION = 1
# At the reset vector, 16 bits: mov dx, ACPI_RESET_PORT / mov al, ACPI_RESET_VALUE / out dx, al / cli / hlt / jmp hlt
_RESET_CODE = bytes.fromhex("ba 04 06  b0 01  ee  fa  f4  eb fd")
_MAX_VCPUS = 255  # APIC ids of 8 bits; 0xff addresses all


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialPort:
    """A 16550A: its first of eight I/O ports and its interrupt line."""

    port: int
    gsi: int


COM1 = SerialPort(port=layout.COM1_PORT, gsi=layout.COM1_GSI)
COM2 = SerialPort(port=layout.COM2_PORT, gsi=layout.COM2_GSI)


@dataclass(frozen=True, slots=True, kw_only=True)
class AcpiTables:
    """Finished tables.

    Attributes:
        rsdp_gpa: Where the RSDP is; what the kernel is told.
        gpa: Where ``blob`` goes.
        blob: RSDP, XSDT, FADT, MADT and DSDT, each on a multiple of 16 bytes.
    """

    rsdp_gpa: int
    gpa: int
    blob: bytes


def build_tables(
    *,
    vcpu_count: int,
    serial_ports: Sequence[SerialPort] = (COM1, COM2),
    virtio_mmio: Sequence[MmioWindow] = (),
) -> AcpiTables:
    """Build the tables of a machine.

    Args:
        vcpu_count: 1 to 255; vCPU n has APIC id n.
        serial_ports: Serial ports in the order in which the driver numbers them.
        virtio_mmio: Windows of the virtio-mmio devices, in order.

    Raises:
        ConfigError: more vCPUs than 8-bit APIC ids, or tables larger than their place.
    """
    if not 1 <= vcpu_count <= _MAX_VCPUS:
        raise ConfigError(f"{vcpu_count} vCPUs, allowed 1..{_MAX_VCPUS}")
    dsdt = _table(b"DSDT", 2, _dsdt_body(serial_ports, virtio_mmio))
    madt = _table(b"APIC", abi.MADT_REVISION, _madt_body(vcpu_count))
    xsdt_size = abi.TABLE_HEADER.size + 16
    xsdt_gpa = layout.ACPI_TABLES + _aligned(abi.RSDP.size)
    fadt_gpa = xsdt_gpa + _aligned(xsdt_size)
    madt_gpa = fadt_gpa + _aligned(abi.FADT_SIZE)
    dsdt_gpa = madt_gpa + _aligned(len(madt))
    fadt = _table(b"FACP", abi.FADT_REVISION, _fadt_body(dsdt_gpa))
    xsdt = _table(b"XSDT", 1, fadt_gpa.to_bytes(8, "little") + madt_gpa.to_bytes(8, "little"))
    blob = b"".join(_pad(table) for table in (_rsdp(xsdt_gpa), xsdt, fadt, madt, dsdt))
    room = layout.RESET_VECTOR - layout.ACPI_TABLES
    if len(blob) > room:
        raise ConfigError(f"ACPI tables of {len(blob)} bytes, there is room for {room}")
    return AcpiTables(rsdp_gpa=layout.ACPI_TABLES, gpa=layout.ACPI_TABLES, blob=blob)


def install(memory: Ram, tables: AcpiTables) -> int:
    """Write the tables to guest memory, and the code at the real-mode reset vector.

    Returns:
        GPA of the RSDP, for ``load_kernel(acpi_rsdp=...)``.

    Raises:
        ConfigError: the guest has less than 1 MiB of RAM.
    """
    require_ram(memory, tables.gpa, layout.ACPI_TABLES_END - tables.gpa, "ACPI tables")
    memory.write(tables.gpa, tables.blob)
    memory.write(layout.RESET_VECTOR, _RESET_CODE)
    return tables.rsdp_gpa


def _aligned(size: int) -> int:
    return (size + 15) & ~15


def _pad(table: bytes) -> bytes:
    return table.ljust(_aligned(len(table)), b"\0")


def _checksum(data: bytes | bytearray) -> int:
    """The byte that makes all bytes add up to 0."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = abi.TABLE_HEADER.size + len(body)
    table = bytearray(
        abi.TABLE_HEADER.pack(signature, size, revision, 0, _OEM_ID, _OEM_TABLE_ID, _REVISION, _CREATOR, _REVISION)
        + body
    )
    table[abi.CHECKSUM_OFFSET] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt_gpa: int) -> bytes:
    def pack(checksum: int, extended: int) -> bytes:
        return abi.RSDP.pack(b"RSD PTR ", checksum, _OEM_ID, 2, 0, abi.RSDP.size, xsdt_gpa, extended)

    checksum = _checksum(pack(0, 0)[: abi.RSDP_V1_SIZE])
    return pack(checksum, _checksum(pack(checksum, 0)))


def _port_register(port: int) -> bytes:
    return abi.GENERIC_ADDRESS.pack(abi.SPACE_SYSTEM_IO, 8, 0, abi.ACCESS_BYTE, port)


def _fadt_body(dsdt_gpa: int) -> bytes:
    fadt = bytearray(abi.FADT_SIZE)

    def put(offset: int, data: bytes) -> None:
        fadt[offset : offset + len(data)] = data

    flags = (
        abi.FADT_FLAG_WBINVD
        | abi.FADT_FLAG_PWR_BUTTON
        | abi.FADT_FLAG_SLP_BUTTON
        | abi.FADT_FLAG_RESET_REG_SUP
        | abi.FADT_FLAG_HW_REDUCED_ACPI
    )
    put(abi.FADT_DSDT, dsdt_gpa.to_bytes(4, "little"))
    put(
        abi.FADT_IAPC_BOOT_ARCH,
        (abi.IAPC_VGA_NOT_PRESENT | abi.IAPC_CMOS_RTC_NOT_PRESENT).to_bytes(2, "little"),
    )
    put(abi.FADT_FLAGS, flags.to_bytes(4, "little"))
    put(abi.FADT_RESET_REG, _port_register(layout.ACPI_RESET_PORT))
    put(abi.FADT_RESET_VALUE, bytes([layout.ACPI_RESET_VALUE]))
    put(abi.FADT_MINOR, bytes([abi.FADT_MINOR_REVISION]))
    put(abi.FADT_X_DSDT, dsdt_gpa.to_bytes(8, "little"))
    put(abi.FADT_SLEEP_CONTROL_REG, _port_register(layout.ACPI_SLEEP_CONTROL_PORT))
    put(abi.FADT_SLEEP_STATUS_REG, _port_register(layout.ACPI_SLEEP_STATUS_PORT))
    put(abi.FADT_HYPERVISOR_VENDOR, b"KVMKVMKV")
    return bytes(fadt[abi.TABLE_HEADER.size :])


def _madt_body(vcpu_count: int) -> bytes:
    # le32 local APIC address, le32 flags (bit 0, PCAT_COMPAT, clear: there is no 8259)
    header = layout.LAPIC.to_bytes(4, "little") + bytes(4)
    cpus = [abi.MADT_LOCAL_APIC.pack(0, 8, cpu, cpu, 1) for cpu in range(vcpu_count)]
    io_apic = abi.MADT_IO_APIC.pack(1, 12, 0, 0, layout.IOAPIC, 0)
    nmi = abi.MADT_LOCAL_APIC_NMI.pack(4, 6, 0xFF, 0, 1)
    return header + b"".join(cpus) + io_apic + nmi


def _dsdt_body(serial_ports: Sequence[SerialPort], virtio_mmio: Sequence[MmioWindow]) -> bytes:
    # \_S5: the value of SLP_TYP for soft off, 5 (layout.ACPI_POWER_OFF_VALUE).
    soft_off = aml.name("\\_S5_", aml.package(aml.integer(5), aml.integer(0)))
    devices = [_serial(index, serial) for index, serial in enumerate(serial_ports)]
    devices += [_virtio_mmio(index, window) for index, window in enumerate(virtio_mmio)]
    return soft_off + aml.scope("\\_SB_", *devices)


def _serial(index: int, serial: SerialPort) -> bytes:
    resources = aml.resource_template(aml.io_ports(serial.port, 8), aml.interrupt(serial.gsi))
    return aml.device(
        f"COM{index + 1}",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CRS", resources),
    )


def _virtio_mmio(index: int, window: MmioWindow) -> bytes:
    resources = aml.resource_template(aml.memory32_fixed(window.gpa, window.size), aml.interrupt(window.gsi))
    return aml.device(
        f"VR{index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", resources),
    )
