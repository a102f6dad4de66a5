"""Multiboot 1 (Multiboot Specification 0.6.96, chapter 3)."""

from __future__ import annotations

from struct import Struct

MULTIBOOT_HEADER_MAGIC = 0x1BADB002
MULTIBOOT_BOOTLOADER_MAGIC = 0x2BADB002
MULTIBOOT_SEARCH = 8192
"""Bytes at the start of the file in which the header must lie, on a multiple of 4."""

# Flags of the header: bits 0-15 must be understood by the loader
MULTIBOOT_PAGE_ALIGN = 1 << 0
MULTIBOOT_MEMORY_INFO = 1 << 1
MULTIBOOT_VIDEO_MODE = 1 << 2
MULTIBOOT_AOUT_KLUDGE = 1 << 16

# le32 magic, le32 flags, le32 checksum (the three add up to 0)
MULTIBOOT_HEADER = Struct("<III")
# With the a.out kludge: le32 header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr
MULTIBOOT_ADDRESSES = Struct("<IIIII")

# Flags of the information structure: which fields are valid
MULTIBOOT_INFO_MEMORY = 1 << 0
MULTIBOOT_INFO_CMDLINE = 1 << 2
MULTIBOOT_INFO_MODS = 1 << 3
MULTIBOOT_INFO_MEM_MAP = 1 << 6
MULTIBOOT_INFO_BOOT_LOADER_NAME = 1 << 9

# 0 flags / 4 mem_lower (KiB) / 8 mem_upper (KiB) / 12 boot_device / 16 cmdline / 20 mods_count / 24 mods_addr
# 28 syms (16 bytes) / 44 mmap_length / 48 mmap_addr / 52 drives_length / 56 drives_addr / 60 config_table
# 64 boot_loader_name / 68 apm_table / 72 vbe and framebuffer (48 bytes): 120 bytes in all
MULTIBOOT_INFO = Struct("<IIIIIII16xIIIIIII48x")
# le32 mod_start, le32 mod_end (exclusive), le32 string, le32 reserved
MULTIBOOT_MOD_LIST = Struct("<IIII")
# le32 size of what follows (20), le64 addr, le64 len, le32 type (the E820 numbers)
MULTIBOOT_MMAP_ENTRY = Struct("<IQQI")
