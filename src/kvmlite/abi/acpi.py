"""ACPI tables and AML opcodes, as far as kvmlite writes them (ACPI 6.5, chapters 5, 6 and 20). Little-endian."""

from __future__ import annotations

from struct import Struct

# 5.2.5.3: 0 "RSD PTR " / 8 u8 checksum of the first 20 bytes / 9 OEMID (6) / 15 u8 revision / 16 le32 RsdtAddress
# 20 le32 length / 24 le64 XsdtAddress / 32 u8 checksum of all 36 bytes / 33 reserved (3)
RSDP = Struct("<8sB6sBIIQB3x")
RSDP_V1_SIZE = 20
# 5.2.6: 0 signature / 4 le32 length with this header / 8 u8 revision / 9 u8 checksum / 10 OEMID (6)
# 16 OEM table id (8) / 24 le32 OEM revision / 28 creator id (4) / 32 le32 creator revision
TABLE_HEADER = Struct("<4sIBB6s8sI4sI")
CHECKSUM_OFFSET = 9
# 5.2.3.2 generic address structure: u8 space, u8 bit width, u8 bit offset, u8 access size, le64 address
GENERIC_ADDRESS = Struct("<BBBBQ")
SPACE_SYSTEM_IO = 1
ACCESS_BYTE = 1

# 5.2.9 FADT, revision 6.5: offsets from the start of the table
FADT_SIZE = 276
FADT_REVISION = 6
FADT_MINOR_REVISION = 5
FADT_DSDT = 40  # le32
FADT_IAPC_BOOT_ARCH = 109  # le16
FADT_FLAGS = 112  # le32
FADT_RESET_REG = 116  # generic address
FADT_RESET_VALUE = 128  # u8
FADT_MINOR = 131  # u8
FADT_X_DSDT = 140  # le64
FADT_SLEEP_CONTROL_REG = 244  # generic address
FADT_SLEEP_STATUS_REG = 256  # generic address
FADT_HYPERVISOR_VENDOR = 268  # 8 bytes

FADT_FLAG_WBINVD = 1 << 0
FADT_FLAG_PWR_BUTTON = 1 << 4  # no fixed power button
FADT_FLAG_SLP_BUTTON = 1 << 5  # no fixed sleep button
FADT_FLAG_RESET_REG_SUP = 1 << 10
FADT_FLAG_HW_REDUCED_ACPI = 1 << 20
# 5.2.9.3: bits 0 (legacy devices) and 1 (8042) stay clear: there are none
IAPC_VGA_NOT_PRESENT = 1 << 2
IAPC_CMOS_RTC_NOT_PRESENT = 1 << 5

# 5.2.12 MADT
MADT_REVISION = 5
MADT_LOCAL_APIC = Struct("<BBBBI")  # type 0, length 8, processor uid, APIC id, flags (bit 0: enabled)
MADT_IO_APIC = Struct("<BBBBII")  # type 1, length 12, id, reserved, address, first GSI
MADT_LOCAL_APIC_NMI = Struct("<BBBHB")  # type 4, length 6, processor uid (0xff: all), flags, LINT#

# 20.2 AML
ZERO_OP = 0x00
ONE_OP = 0x01
NAME_OP = 0x08
BYTE_PREFIX = 0x0A
WORD_PREFIX = 0x0B
DWORD_PREFIX = 0x0C
STRING_PREFIX = 0x0D
QWORD_PREFIX = 0x0E
SCOPE_OP = 0x10
BUFFER_OP = 0x11
PACKAGE_OP = 0x12
DUAL_NAME_PREFIX = 0x2E
EXT_OP_PREFIX = 0x5B
DEVICE_OP = 0x82  # after EXT_OP_PREFIX
ROOT_CHAR = 0x5C

# 6.4 resource descriptors
IO_PORT = Struct("<BBHHBB")  # tag 0x47, information (bit 0: 16 address lines), min, max, alignment, length
MEMORY32_FIXED = Struct("<BHBII")  # tag 0x86, length 9, information (bit 0: writable), base, length
EXTENDED_INTERRUPT = Struct("<BHBBI")  # tag 0x89, length 6, flags, count 1, GSI
INTERRUPT_CONSUMER = 1 << 0
INTERRUPT_EDGE = 1 << 1  # active high and exclusive are the zeros of bits 2 and 3
END_TAG = b"\x79\x00"
