"""ELF as far as loading a kernel needs it (System V ABI, gABI chapter 4 and 5): little-endian, 32 and 64 bits."""

from __future__ import annotations

from struct import Struct

ELFMAG = b"\x7fELF"
EI_CLASS = 4
EI_DATA = 5
ELFCLASS32 = 1
ELFCLASS64 = 2
ELFDATA2LSB = 1
ELFDATA2MSB = 2

ET_REL = 1
ET_EXEC = 2
ET_DYN = 3
ET_CORE = 4

EM_386 = 3
EM_X86_64 = 62
MACHINE_NAMES = {
    2: "SPARC",
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    22: "S/390",
    40: "ARM (32-bit)",
    43: "SPARC V9",
    50: "IA-64",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    247: "BPF",
    258: "LoongArch",
}

PT_LOAD = 1
PT_INTERP = 3
PT_NOTE = 4
PN_XNUM = 0xFFFF

# Shape of the file header after e_ident (16 bytes): e_type e_machine e_version e_entry e_phoff e_shoff e_flags
# e_ehsize e_phentsize e_phnum e_shentsize e_shnum e_shstrndx.
EHDR32 = Struct("<16xHHIIIIIHHHHHH")
EHDR64 = Struct("<16xHHIQQQIHHHHHH")
# 32 bits: p_type p_offset p_vaddr p_paddr p_filesz p_memsz p_flags p_align
PHDR32 = Struct("<IIIIIIII")
# 64 bits: p_type p_flags p_offset p_vaddr p_paddr p_filesz p_memsz p_align
PHDR64 = Struct("<IIQQQQQQ")
# n_namesz n_descsz n_type, then the name and the description, each padded
NHDR = Struct("<III")

# Notes of owner "Xen" (xen/include/public/elfnote.h)
XEN_ELFNOTE_GUEST_OS = 6
XEN_ELFNOTE_PHYS32_ENTRY = 18
