from __future__ import annotations

import subprocess

import pytest

from kvmlite.abi import layout
from kvmlite.boot import acpi
from kvmlite.errors import ConfigError

WINDOWS = [layout.virtio_mmio_window(index) for index in range(19)]


def table(blob: bytes, signature: bytes) -> bytes:
    """A table found as a kernel finds it: RSDP, XSDT, FADT, DSDT."""

    def at(gpa: int) -> bytes:
        rest = blob[gpa - 0xE0000 :]
        return rest[: int.from_bytes(rest[4:8], "little")]

    xsdt = at(int.from_bytes(blob[24:32], "little"))
    tables = [at(int.from_bytes(xsdt[i : i + 8], "little")) for i in range(36, len(xsdt), 8)]
    tables.append(at(int.from_bytes(tables[0][140:148], "little")))
    return {found[:4]: found for found in [xsdt, *tables]}[signature]


@pytest.fixture(scope="module")
def blob():
    return acpi.build_tables(vcpu_count=2, virtio_mmio=WINDOWS).blob


def test_rsdp_points_at_the_xsdt(blob):
    assert blob[:8] == b"RSD PTR "
    assert blob[15:24] == bytes.fromhex("02 00000000 24000000")
    assert blob[24:32] == bytes.fromhex("30000e0000000000")
    assert sum(blob[:20]) % 256 == 0
    assert sum(blob[:36]) % 256 == 0


@pytest.mark.parametrize("signature", [b"XSDT", b"FACP", b"APIC", b"DSDT"])
def test_checksums_add_up_to_zero(blob, signature):
    assert sum(table(blob, signature)) % 256 == 0


def test_fadt_is_hardware_reduced_with_reset_and_sleep_registers(blob):
    fadt = table(blob, b"FACP")
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 5)
    assert fadt[109:111] == bytes.fromhex("2400")  # no VGA, no RTC; 8042 and legacy devices not claimed
    assert fadt[112:116] == bytes.fromhex("31041000")
    assert fadt[116:129] == bytes.fromhex("01080001 0406000000000000 01")
    assert fadt[244:256] == bytes.fromhex("01080001 0006000000000000")
    assert fadt[256:268] == bytes.fromhex("01080001 0106000000000000")
    assert fadt[40:44] + bytes(4) == fadt[140:148]


def test_madt_lists_cpus_and_the_ioapic(blob):
    assert table(blob, b"APIC")[36:] == bytes.fromhex(
        "0000e0fe 0000000000080000 0100000000080101 01000000010c0000 0000c0fe 000000000406ff00 0001"
    )


def test_dsdt_of_one_port_and_one_device():
    tables = acpi.build_tables(vcpu_count=1, serial_ports=[acpi.COM1], virtio_mmio=WINDOWS[:1])
    assert table(tables.blob, b"DSDT")[36:] == (
        b"\x08\\_S5_\x12\x05\x02\x0a\x05\x00"
        b"\x10\x4d\x07\\_SB_"
        b"\x5b\x82\x31COM1\x08_HID\x0c\x41\xd0\x05\x01\x08_UID\x00\x08_CRS\x11\x16\x0a\x13"
        + bytes.fromhex("4701f803f8030108 890600030104000000 7900")
        + b"\x5b\x82\x41\x04VR00\x08_HID\x0dLNRO0005\0\x08_UID\x00\x08_CCA\x01\x08_CRS\x11\x1a\x0a\x17"
        + bytes.fromhex("8609000100 0f00d0 00100000 890600030105000000 7900")
    )


def test_power_off_value_is_what_the_dsdt_says():
    assert layout.ACPI_POWER_OFF_VALUE == 1 << 5 | 5 << 2


def test_install_writes_the_tables_and_the_reset_code(memory, blob):
    tables = acpi.build_tables(vcpu_count=2, virtio_mmio=WINDOWS)
    assert acpi.install(memory, tables) == 0xE0000
    assert memory.read(0xE0000, len(blob)) == blob
    # mov dx, 0x604 / mov al, 1 / out dx, al / cli / hlt / jmp to hlt
    assert memory.read(0xFFFF0, 10) == bytes.fromhex("ba0406 b001 ee fa f4 ebfd")


def test_install_needs_a_mebibyte_of_ram(make_memory):
    tables = acpi.build_tables(vcpu_count=1)
    with pytest.raises(ConfigError, match="ACPI tables needs RAM"):
        acpi.install(make_memory(layout=[(0, 0xF0000)]), tables)


@pytest.mark.parametrize("count", [0, 256])
def test_vcpu_count_outside_8_bit_apic_ids_is_refused(count):
    with pytest.raises(ConfigError, match=r"allowed 1\.\.255"):
        acpi.build_tables(vcpu_count=count)


def test_largest_machine_fits():
    assert len(acpi.build_tables(vcpu_count=255, virtio_mmio=WINDOWS).blob) < 0x1FFF0


@pytest.mark.iasl
def test_iasl_compiles_what_it_decompiles_without_a_remark(blob, tmp_path):
    (tmp_path / "dsdt.aml").write_bytes(table(blob, b"DSDT"))
    for arguments in (["-d", "dsdt.aml"], ["dsdt.dsl"]):
        done = subprocess.run(
            ["iasl", *arguments],
            check=False,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "0 Errors, 0 Warnings, 0 Remarks" in done.stdout
