"""The real command on files that are almost kernels, and on guests of a few bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command import Command

RELEASE = "6.1.0-7-cloud-amd64"

PRINT_FOR_EVER = "1: outb 0x78, 0x3f8\n outb 10, 0x3f8\n jmp 1b"
LOOP_FOR_EVER = "1: jmp 1b"
PRINT_AND_EXIT_7 = "outb 0x78, 0x3f8\n outb 10, 0x3f8\n debug_exit 3"


@pytest.fixture
def kvmlite(tmp_path: Path) -> Iterator[Command]:
    """Runs the command; whatever the test did, no process and no file may be left."""
    command = Command(tmp_path)
    yield command
    assert command.remains() == []


@pytest.fixture
def print_for_ever(assemble: Callable[[str], Path]) -> Path:
    return assemble(PRINT_FOR_EVER)


@pytest.fixture
def loop_for_ever(assemble: Callable[[str], Path]) -> Path:
    return assemble(LOOP_FOR_EVER)


@pytest.fixture
def print_and_exit_7(assemble: Callable[[str], Path]) -> Path:
    return assemble(PRINT_AND_EXIT_7)


def bzimage(size: int = 0x800) -> bytes:
    """The head of a bzImage of ``size`` bytes, and nothing in it that could run."""
    head = bytearray(0x400)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, (size - 0x400) // 16)
    struct.pack_into("<H", head, 0x1FE, 0xAA55)
    head[0x201:0x206] = b"\x66HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<H", head, 0x20E, 0x100)
    struct.pack_into("<I", head, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", head, 0x236, 1)
    struct.pack_into("<I", head, 0x238, 2047)
    struct.pack_into("<Q", head, 0x258, 0x1000000)
    struct.pack_into("<I", head, 0x260, size - 0x400)
    text = RELEASE.encode() + b" (builder@host) #1 SMP\0"
    head[0x300 : 0x300 + len(text)] = text
    return bytes(head) + b"\x90" * (size - 0x400)


@pytest.fixture
def kernel_package(tmp_path: Path) -> Path:
    """An unpacked kernel package whose one module, virtio_mmio, is damaged."""
    root = tmp_path / "package"
    (root / "boot").mkdir(parents=True)
    (root / f"boot/vmlinuz-{RELEASE}").write_bytes(bzimage())
    modules = root / "lib/modules" / RELEASE
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel/virtio_mmio.ko").write_bytes(b"\x7fELF\x02\x01\x01" + b"\xff" * 200)
    (modules / "modules.order").write_text("kernel/virtio_mmio.ko\n")
    (modules / "modules.builtin").write_text("")
    (modules / "modules.dep").write_text("kernel/virtio_mmio.ko:\n")
    return root
