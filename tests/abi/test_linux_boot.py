"""The numbers of ``abi.linux_boot`` and ``abi.elf`` against the installed kernel headers."""

from __future__ import annotations

import subprocess

import pytest

from kvmlite.abi import elf, linux_boot

HEADER_FIELDS = {
    "SETUP_SECTS": "setup_sects",
    "ROOT_FLAGS": "root_flags",
    "SYSSIZE": "syssize",
    "VID_MODE": "vid_mode",
    "BOOT_FLAG": "boot_flag",
    "HEADER": "header",
    "VERSION": "version",
    "KERNEL_VERSION": "kernel_version",
    "TYPE_OF_LOADER": "type_of_loader",
    "LOADFLAGS": "loadflags",
    "CODE32_START": "code32_start",
    "RAMDISK_IMAGE": "ramdisk_image",
    "RAMDISK_SIZE": "ramdisk_size",
    "CMD_LINE_PTR": "cmd_line_ptr",
    "INITRD_ADDR_MAX": "initrd_addr_max",
    "KERNEL_ALIGNMENT": "kernel_alignment",
    "RELOCATABLE_KERNEL": "relocatable_kernel",
    "XLOADFLAGS": "xloadflags",
    "CMDLINE_SIZE": "cmdline_size",
    "HARDWARE_SUBARCH": "hardware_subarch",
    "PAYLOAD_OFFSET": "payload_offset",
    "PAYLOAD_LENGTH": "payload_length",
    "SETUP_DATA_PTR": "setup_data",
    "PREF_ADDRESS": "pref_address",
    "INIT_SIZE": "init_size",
}
PAGE_FIELDS = {
    "SETUP_HEADER": "hdr",
    "ACPI_RSDP_ADDR": "acpi_rsdp_addr",
    "EXT_RAMDISK_IMAGE": "ext_ramdisk_image",
    "EXT_RAMDISK_SIZE": "ext_ramdisk_size",
    "EXT_CMD_LINE_PTR": "ext_cmd_line_ptr",
    "E820_ENTRIES": "e820_entries",
    "E820_TABLE": "e820_table",
}
BOOT_CONSTANTS = (
    "E820_MAX_ENTRIES_ZEROPAGE",
    "LOADED_HIGH",
    "KASLR_FLAG",
    "XLF_KERNEL_64",
    "X86_SUBARCH_PC",
)
ELF_CONSTANTS = (
    *("EI_CLASS", "EI_DATA", "ELFCLASS32", "ELFCLASS64", "ELFDATA2LSB", "ELFDATA2MSB"),
    *(
        "ET_REL",
        "ET_EXEC",
        "ET_DYN",
        "ET_CORE",
        "EM_386",
        "EM_X86_64",
        "PT_LOAD",
        "PT_INTERP",
        "PT_NOTE",
        "PN_XNUM",
    ),
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Name to value, as the compiler sees it."""
    expressions = {
        **{name: f"offsetof(struct boot_params, hdr.{field})" for name, field in HEADER_FIELDS.items()},
        **{name: f"offsetof(struct boot_params, {field})" for name, field in PAGE_FIELDS.items()},
        **{name: name for name in (*BOOT_CONSTANTS, *ELF_CONSTANTS)},
        "BOOT_PARAMS_SIZE": "sizeof(struct boot_params)",
        "BOOT_E820_ENTRY": "sizeof(struct boot_e820_entry)",
        "SETUP_DATA": "sizeof(struct setup_data)",
        "EHDR32": "sizeof(Elf32_Ehdr)",
        "EHDR64": "sizeof(Elf64_Ehdr)",
        "PHDR32": "sizeof(Elf32_Phdr)",
        "PHDR64": "sizeof(Elf64_Phdr)",
        "NHDR": "sizeof(Elf64_Nhdr)",
    }
    lines = [f'printf("{name} %llu\\n", (unsigned long long)({value}));' for name, value in expressions.items()]
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <elf.h>\n#include <asm/bootparam.h>\n"
        "int main(void)\n{\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    program = folder / "abi"
    subprocess.run(["gcc", "-w", str(folder / "abi.c"), "-o", str(program)], check=True, timeout=60)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=30)
    return {name: int(value) for name, value in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.parametrize("name", [*HEADER_FIELDS, *PAGE_FIELDS, *BOOT_CONSTANTS, "BOOT_PARAMS_SIZE"])
def test_boot_protocol_number_is_the_kernels(compiled, name):
    assert getattr(linux_boot, name) == compiled[name]


@pytest.mark.parametrize("name", ["BOOT_E820_ENTRY", "SETUP_DATA"])
def test_boot_protocol_structure_has_the_kernels_size(compiled, name):
    assert getattr(linux_boot, name).size == compiled[name]


@pytest.mark.parametrize("name", ELF_CONSTANTS)
def test_elf_number_is_the_kernels(compiled, name):
    assert getattr(elf, name) == compiled[name]


@pytest.mark.parametrize("name", ["EHDR32", "EHDR64", "PHDR32", "PHDR64", "NHDR"])
def test_elf_structure_has_the_kernels_size(compiled, name):
    assert getattr(elf, name).size == compiled[name]
