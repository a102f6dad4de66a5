"""The Linux/x86 boot protocol: ``struct setup_header`` and ``struct boot_params`` (asm/bootparam.h).

Offsets of the setup header are the same in a bzImage file and in the zero page.
"""

from __future__ import annotations

from struct import Struct

E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3
E820_MAX_ENTRIES_ZEROPAGE = 128
# le64 addr, le64 size (bytes), le32 type
BOOT_E820_ENTRY = Struct("<QQI")

SETUP_RNG_SEED = 9
# le64 next (GPA or 0), le32 type, le32 len (bytes of the data that follows)
SETUP_DATA = Struct("<QII")

# Fields of struct boot_params outside the setup header
ACPI_RSDP_ADDR = 0x070  # le64
EXT_RAMDISK_IMAGE = 0x0C0  # le32, bits 32-63
EXT_RAMDISK_SIZE = 0x0C4  # le32, bits 32-63
EXT_CMD_LINE_PTR = 0x0C8  # le32, bits 32-63
E820_ENTRIES = 0x1E8  # u8
E820_TABLE = 0x2D0
BOOT_PARAMS_SIZE = 4096

# Fields of struct setup_header
SETUP_HEADER = 0x1F1  # its first byte
SETUP_SECTS = 0x1F1  # u8, 512-byte sectors without the boot sector; 0 means 4
ROOT_FLAGS = 0x1F2  # le16, 1 = mount read-only
SYSSIZE = 0x1F4  # le32, 16-byte units
VID_MODE = 0x1FA  # le16, 0xffff = normal
BOOT_FLAG = 0x1FE  # le16
SETUP_HEADER_END = 0x201  # u8: the header ends at 0x202 + this byte
HEADER = 0x202  # le32 "HdrS"
VERSION = 0x206  # le16
KERNEL_VERSION = 0x20E  # le16, offset of a string, minus 0x200
TYPE_OF_LOADER = 0x210  # u8
LOADFLAGS = 0x211  # u8
CODE32_START = 0x214  # le32
RAMDISK_IMAGE = 0x218  # le32
RAMDISK_SIZE = 0x21C  # le32
CMD_LINE_PTR = 0x228  # le32
INITRD_ADDR_MAX = 0x22C  # le32, highest address the initrd's last byte may have
KERNEL_ALIGNMENT = 0x230  # le32
RELOCATABLE_KERNEL = 0x234  # u8
XLOADFLAGS = 0x236  # le16
CMDLINE_SIZE = 0x238  # le32, without the terminating NUL
HARDWARE_SUBARCH = 0x23C  # le32
PAYLOAD_OFFSET = 0x248  # le32, from the start of the protected-mode code
PAYLOAD_LENGTH = 0x24C  # le32
SETUP_DATA_PTR = 0x250  # le64
PREF_ADDRESS = 0x258  # le64
INIT_SIZE = 0x260  # le32, bytes of RAM the kernel needs from where it runs

BOOT_FLAG_MAGIC = 0xAA55
HDRS_MAGIC = b"HdrS"
LOADER_UNDEFINED = 0xFF
X86_SUBARCH_PC = 0
LOADED_HIGH = 1 << 0
KASLR_FLAG = 1 << 1
XLF_KERNEL_64 = 1 << 0
PROTOCOL_2_08 = 0x0208  # payload_offset
PROTOCOL_2_12 = 0x020C  # xloadflags
PROTOCOL_2_15 = 0x020F
ENTRY_64 = 0x200
"""Offset of the 64-bit entry from where the protected-mode code was loaded."""
START_KERNEL_MAP = 0xFFFFFFFF80000000
"""``__START_KERNEL_map``: p_vaddr - p_paddr of a vmlinux."""
