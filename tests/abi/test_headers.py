"""Every number in ``kvmlite.abi`` that the kernel's UAPI headers also know has the headers' value.

A C program made of the modules' own names prints what the compiler thinks of each; names that no header defines are
checked elsewhere (they are kvmlite's, or from a specification without a C header). So a new constant is covered the
moment it is written down. ``test_linux_boot.py`` and ``test_virtio.py`` look at what needs more than a name.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path
from struct import Struct

import pytest
from support.requirements import ROOT

HEADERS = (
    "linux/kvm.h",
    "linux/vm_sockets.h",
    "linux/virtio_config.h",
    "linux/virtio_ids.h",
    "linux/virtio_ring.h",
    "linux/virtio_mmio.h",
    "linux/virtio_console.h",
    "linux/virtio_rng.h",
    "linux/virtio_blk.h",
    "linux/virtio_net.h",
    "linux/virtio_vsock.h",
    "linux/virtio_balloon.h",
    "linux/virtio_pmem.h",
    "linux/virtio_fs.h",
    "linux/fuse.h",
    "linux/if_tun.h",
    "linux/vhost.h",
    "linux/elf.h",
    "asm/bootparam.h",
    "asm/e820.h",
    "asm/processor-flags.h",
    "xen/start_info.h",
)

# Modules whose names say nothing about a C header (ACPI, ELF class names that differ, multiboot) still go through the
# same mill: what no header defines is not compared.
MODULES = tuple(sorted(path.stem for path in (ROOT / "src/kvmlite/abi").glob("*.py") if path.stem != "__init__"))

# How many names of a module the headers must know at least: a test that compares nothing must not pass.
FLOORS = {
    "kvm": 60,
    "kvm_ioctls": 23,
    "virtio": 14,
    "virtio_mmio": 25,
    "virtio_console": 8,
    "virtio_vsock": 12,
    "virtio_balloon": 16,
    "virtio_pmem": 1,
    "virtio_net": 30,
    "tun": 12,
    "vhost": 15,
    "linux_boot": 3,
    "elf": 10,
}

# Struct of a module -> C type it mirrors
STRUCTS = {
    "virtio": {"VRING_DESC": "struct vring_desc", "VRING_USED_ELEM": "struct vring_used_elem"},
    "vhost": {
        "VHOST_MEMORY": "struct vhost_memory",
        "VHOST_MEMORY_REGION": "struct vhost_memory_region",
        "VHOST_VRING_ADDR": "struct vhost_vring_addr",
        "VHOST_VRING_FILE": "struct vhost_vring_file",
        "VHOST_VRING_STATE": "struct vhost_vring_state",
    },
    "virtio_net": {
        # Newer headers go on: speed, hash reports.
        "VIRTIO_NET_CONFIG": "char[offsetof(struct virtio_net_config, mtu) + 2]",
        "VIRTIO_NET_HDR": "struct virtio_net_hdr_v1",
    },
    "virtio_blk": {
        # Newer headers go on: secure erase, zones.
        "VIRTIO_BLK_CONFIG": "char[offsetof(struct virtio_blk_config, unused1) + 3]",
        "VIRTIO_BLK_DISCARD_WRITE_ZEROES": "struct virtio_blk_discard_write_zeroes",
        "VIRTIO_BLK_OUTHDR": "struct virtio_blk_outhdr",
    },
    "virtio_vsock": {
        "VIRTIO_VSOCK_CONFIG": "struct virtio_vsock_config",
        "VIRTIO_VSOCK_EVENT": "struct virtio_vsock_event",
        "VIRTIO_VSOCK_HDR": "struct virtio_vsock_hdr",
    },
    "virtio_pmem": {
        "VIRTIO_PMEM_CONFIG": "struct virtio_pmem_config",
        "VIRTIO_PMEM_REQ": "struct virtio_pmem_req",
        "VIRTIO_PMEM_RESP": "struct virtio_pmem_resp",
    },
    "virtio_balloon": {
        "VIRTIO_BALLOON_CONFIG": "struct virtio_balloon_config",
        "VIRTIO_BALLOON_STAT": "struct virtio_balloon_stat",
    },
    "virtio_fs": {
        "VIRTIO_FS_CONFIG": "struct virtio_fs_config",
        "FUSE_IN_HEADER": "struct fuse_in_header",
        "FUSE_OUT_HEADER": "struct fuse_out_header",
    },
    "vhost_user": {
        "VRING_STATE": "struct vhost_vring_state",
        "VRING_ADDR": "struct vhost_vring_addr",
        "MEMORY_REGION": "struct vhost_memory_region",
        "MEMORY_HEADER": "struct vhost_memory",
    },
    "virtio_console": {
        "VIRTIO_CONSOLE_CONFIG": "struct virtio_console_config",
        "VIRTIO_CONSOLE_CONTROL": "struct virtio_console_control",
    },
}

# Flags the headers have only as enumerators or under another form
NOT_COMPARED = {
    ("linux_boot", "SETUP_HEADER"),
    ("virtio_mmio", "VIRTIO_MMIO_VERSION"),  # there the offset of the register
}


def constants(module: str) -> dict[str, int]:
    """``C name -> value`` of every whole number and enum member; an enum's docstring says which prefix it drops."""
    found = {}
    for name, value in vars(importlib.import_module(f"kvmlite.abi.{module}")).items():
        if name.isupper() and isinstance(value, int) and (module, name) not in NOT_COMPARED:
            found[name] = int(value)
        elif isinstance(value, type) and issubclass(value, Enum) and value.__module__ == f"kvmlite.abi.{module}":
            prefix = re.search(r"Prefix dropped: ``(\w+)``", value.__doc__ or "")
            assert prefix, f"{module}.{name}: its docstring does not say which prefix is dropped"
            found.update({prefix[1] + member: int(number.value) for member, number in value.__members__.items()})
    return found


@pytest.fixture(scope="session")
def compiler() -> str:
    """The C compiler kvmlite is built with."""
    path = shutil.which("gcc")
    assert path is not None, "gcc is needed to build kvmlite, and to test it"
    return path


def evaluate(compiler: str, directory: Path, expressions: dict[str, str], preamble: str = "") -> dict[str, int]:
    """``label -> value`` of C expressions; one program for all."""
    lines = [f'printf("%s %llu\\n", "{label}", (unsigned long long)({text}));' for label, text in expressions.items()]
    includes = "".join(f"#if __has_include(<{header}>)\n#include <{header}>\n#endif\n" for header in HEADERS)
    source = directory / "values.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include <sys/ioctl.h>\n{includes}{preamble}\n"
        f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"
    )
    program = directory / "values"
    result = subprocess.run([compiler, "-w", "-o", program, source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {label: int(value) for label, value in (line.split() for line in output.splitlines())}


@pytest.fixture(scope="session")
def header_values(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the headers say of each name that any module has and any header knows: macros and enumerators."""
    directory = tmp_path_factory.mktemp("abi")
    names = sorted({name for module in MODULES for name in constants(module)})
    return evaluate(compiler, directory, {name: name for name in sorted(defined_names(compiler, directory, names))})


def defined_names(compiler: str, directory: Path, names: list[str]) -> set[str]:
    """Of ``names``, those that the headers define. One compilation: each unknown name is one error message."""
    includes = "".join(f"#if __has_include(<{header}>)\n#include <{header}>\n#endif\n" for header in HEADERS)
    uses = "".join(
        f"unsigned long long use_{number} (void) {{ return {name}; }}\n" for number, name in enumerate(names)
    )
    source = directory / "names.c"
    source.write_text(f"#include <stddef.h>\n#include <sys/ioctl.h>\n{includes}{uses}")
    result = subprocess.run(
        [compiler, "-w", "-fsyntax-only", "-fmax-errors=0", source],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
    )
    unknown = set(re.findall(r"error: '(\w+)' undeclared", result.stderr))
    assert "fatal error" not in result.stderr, result.stderr
    return set(names) - unknown


@pytest.mark.parametrize("module", MODULES)
def test_constants_have_the_headers_values(module: str, header_values: dict[str, int]) -> None:
    compared = {name: value for name, value in constants(module).items() if name in header_values}
    different = {
        name: f"{value:#x} here, {header_values[name]:#x} in the header"
        for name, value in compared.items()
        if value & 0xFFFFFFFFFFFFFFFF != header_values[name] & 0xFFFFFFFFFFFFFFFF
        and not (value == 0xFFFFFFFF and header_values[name] == 0xFFFFFFFFFFFFFFFF)  # -1U against -1
    }
    assert different == {}
    assert len(compared) >= FLOORS.get(module, 0), f"the headers know only {len(compared)}: {sorted(compared)}"


@pytest.mark.parametrize("module", sorted(STRUCTS))
def test_structs_have_the_headers_sizes(module: str, compiler: str, tmp_path: Path) -> None:
    types = STRUCTS[module]
    sizes = evaluate(compiler, tmp_path, {name: f"sizeof({c_type})" for name, c_type in types.items()})
    here = importlib.import_module(f"kvmlite.abi.{module}")
    assert {name: getattr(here, name).size for name in types} == sizes


def test_every_struct_of_a_virtio_module_is_compared() -> None:
    for module in (name for name in MODULES if name.startswith("virtio")):
        structs = {
            n for n, v in vars(importlib.import_module(f"kvmlite.abi.{module}")).items() if isinstance(v, Struct)
        }
        assert structs - {"VIRTIO_CONSOLE_RESIZE_SIZE"} <= STRUCTS.get(module, {}).keys()


def test_ioctl_numbers_are_up_to_date() -> None:
    script = ROOT / "scripts/generate-ioctls"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_cffi_structures_have_the_headers_sizes(compiler: str, tmp_path: Path) -> None:
    from kvmlite._native import ffi

    text = (ROOT / "src/kvmlite/_native/cdef/kvm.h").read_text()
    names = re.findall(r"^struct (kvm_\w+) \{", text, re.MULTILINE)
    assert len(names) >= 15
    sizes = evaluate(compiler, tmp_path, {name: f"sizeof(struct {name})" for name in names})
    assert {name: ffi.sizeof(f"struct {name}") for name in names} == sizes
