"""virtio numbers in Python against the kernel's headers."""

from __future__ import annotations

import re
import subprocess

import pytest

from kvmlite.abi import virtio, virtio_blk, virtio_console, virtio_mmio

HEADERS = ("virtio_config", "virtio_ids", "virtio_ring", "virtio_mmio", "virtio_console", "virtio_blk")


@pytest.fixture(scope="module")
def macros() -> dict[str, int]:
    """Every macro of the headers that is a number."""
    source = "".join(f"#include <linux/{name}.h>\n" for name in HEADERS)
    text = subprocess.run(["gcc", "-E", "-dM", "-"], input=source, capture_output=True, text=True, check=True).stdout
    found = {}
    for name, value in re.findall(r"^#define (V\w+)\s+(.+)$", text, re.MULTILINE):
        shift = re.fullmatch(r"\(1 << (\d+)\)", value)
        if shift:
            found[name] = 1 << int(shift[1])
        elif re.fullmatch(r"0x[0-9a-fA-F]+|\d+", value):
            found[name] = int(value, 0)
    return found


@pytest.mark.parametrize("module", [virtio, virtio_mmio, virtio_console, virtio_blk])
def test_plain_constants_have_the_kernels_values(module: object, macros: dict[str, int]) -> None:
    ours = {
        name: value for name, value in vars(module).items() if re.match("VIRTIO_|VRING_", name) and type(value) is int
    }
    ours.pop("VIRTIO_MMIO_MAGIC", None)  # the kernel spells it as four characters
    ours.pop("VIRTIO_MMIO_VERSION_2", None)
    ours.pop("VIRTIO_MMIO_SIZE", None)
    assert ours
    assert ours == {name: macros[name] for name in ours}


@pytest.mark.parametrize(
    ("members", "prefix"),
    [
        (virtio.DeviceStatus, "VIRTIO_CONFIG_S_"),
        (virtio_mmio.MmioRegister, "VIRTIO_MMIO_"),
        (virtio_console.ConsoleEvent, "VIRTIO_CONSOLE_"),
    ],
)
def test_enum_members_have_the_kernels_values(members: type, prefix: str, macros: dict[str, int]) -> None:
    ours = {name: int(member) for name, member in members.__members__.items()}
    assert ours == {name: macros[prefix + name] for name in ours}


@pytest.mark.parametrize(
    ("kernel_struct", "header", "ours"),
    [
        ("struct vring_desc", "virtio_ring", virtio.VRING_DESC),
        ("struct vring_used_elem", "virtio_ring", virtio.VRING_USED_ELEM),
        ("struct virtio_console_config", "virtio_console", virtio_console.VIRTIO_CONSOLE_CONFIG),
        ("struct virtio_console_control", "virtio_console", virtio_console.VIRTIO_CONSOLE_CONTROL),
    ],
)
def test_layouts_have_the_kernels_size(kernel_struct: str, header: str, ours: object) -> None:
    source = f'#include <linux/{header}.h>\n_Static_assert(sizeof({kernel_struct}) == {ours.size}, "size");\n'  # type: ignore[attr-defined]
    subprocess.run(["gcc", "-fsyntax-only", "-xc", "-"], input=source, text=True, check=True)
