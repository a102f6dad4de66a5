"""The PVH boot ABI: ``struct hvm_start_info`` version 1 (xen/include/public/arch-x86/hvm/start_info.h)."""

from __future__ import annotations

from struct import Struct

XEN_HVM_START_MAGIC_VALUE = 0x336EC578
XEN_HVM_START_INFO_VERSION = 1

# 0 le32 magic / 4 le32 version / 8 le32 flags / 12 le32 nr_modules / 16 le64 modlist_paddr / 24 le64 cmdline_paddr
# 32 le64 rsdp_paddr / 40 le64 memmap_paddr / 48 le32 memmap_entries / 52 le32 reserved
HVM_START_INFO = Struct("<IIIIQQQQII")
# le64 paddr, le64 size, le64 cmdline_paddr, le64 reserved
HVM_MODLIST_ENTRY = Struct("<QQQQ")
# le64 addr, le64 size, le32 type (the E820 numbers), le32 reserved
HVM_MEMMAP_TABLE_ENTRY = Struct("<QQII")
