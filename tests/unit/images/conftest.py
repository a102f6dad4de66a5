"""Kernels, modules and packages of a few bytes, for the tests of kvmlite.images."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RELEASE = "6.1.0-7-cloud-amd64"


def bzimage(release: str = RELEASE, *, padding: int = 0) -> bytes:
    """Make the smallest file that boot.open_kernel takes for a bzImage; its release string lies at 0x300."""
    code_size = 0x400 + padding
    head = bytearray(0x400)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, code_size // 16)
    struct.pack_into("<H", head, 0x1FE, 0xAA55)
    head[0x201] = 0x66
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<H", head, 0x20E, 0x100 if release else 0)
    struct.pack_into("<H", head, 0x236, 1)
    struct.pack_into("<I", head, 0x238, 2047)
    struct.pack_into("<Q", head, 0x258, 0x1000000)
    struct.pack_into("<I", head, 0x260, code_size)
    text = release.encode() + b" (builder@host) #1 SMP\0"
    head[0x300 : 0x300 + len(text)] = text
    return bytes(head) + b"\x90" * code_size


def module(depends: str = "", *, release: str = RELEASE, softdep: str = "", machine: int = 62) -> bytes:
    """Make a relocatable ELF object with a .modinfo section and nothing else."""
    info = [f"depends={depends}", f"vermagic={release} SMP preempt mod_unload"]
    info += [f"softdep={softdep}"] if softdep else []
    modinfo = b"\0".join([text.encode() for text in info]) + b"\0"
    strings = b"\0.modinfo\0.shstrtab\0"
    sections = 64 + len(modinfo) + len(strings)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, machine, 1, 0, 0, sections, 0, 64, 0, 0, 64, 3, 2
    )
    table = bytes(64)
    table += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(modinfo), 0, 0, 1, 0)
    table += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(modinfo), len(strings), 0, 0, 1, 0)
    return header + modinfo + strings + table


def install_modules(root: Path, modules: dict[str, bytes], *, release: str = RELEASE, builtin: str = "") -> Path:
    """Write modules (path below kernel/ to contents) as a Debian package has them: without modules.dep."""
    directory = root / "lib/modules" / release
    for path, data in modules.items():
        file = directory / "kernel" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    directory.mkdir(parents=True, exist_ok=True)
    order = [f"kernel/{path.removesuffix('.xz').removesuffix('.gz').removesuffix('.zst')}\n" for path in modules]
    (directory / "modules.order").write_text("".join(order))
    (directory / "modules.builtin").write_text("".join([f"kernel/fs/{name}.ko\n" for name in builtin.split()]))
    return directory


VIRTIO = {
    "drivers/virtio/virtio.ko": module("virtio_ring"),
    "drivers/virtio/virtio_ring.ko": module(),
    "drivers/virtio/virtio_mmio.ko": module("virtio,virtio_ring"),
    "drivers/char/hw_random/virtio-rng.ko": module("virtio"),
}


def package(root: Path, *, release: str = RELEASE, modules: dict[str, bytes] | None = None, padding: int = 0) -> Path:
    """Write an unpacked kernel package below ``root``."""
    (root / "boot").mkdir(parents=True)
    (root / f"boot/vmlinuz-{release}").write_bytes(bzimage(release, padding=padding))
    (root / f"boot/config-{release}").write_text("CONFIG_EXT4_FS=y\nCONFIG_OVERLAY_FS=m\n")
    install_modules(root, VIRTIO if modules is None else modules, release=release, builtin="ext4")
    return root


class Images:
    """The functions above, as a fixture."""

    RELEASE = RELEASE
    VIRTIO = VIRTIO
    bzimage = staticmethod(bzimage)
    module = staticmethod(module)
    install_modules = staticmethod(install_modules)
    package = staticmethod(package)


@pytest.fixture
def images() -> type[Images]:
    return Images


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A KVMLITE_HOME of its own for the test."""
    path = tmp_path / "home"
    monkeypatch.setenv("KVMLITE_HOME", str(path))
    return path


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Arm a Ctrl-C at the n-th file operation: before it (even n) or just after it (odd n)."""
    import fcntl
    import os
    import shutil

    state, open_file = {"left": -1}, os.open

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            left, state["left"] = state["left"], state["left"] - 2
            if left == 0:
                raise KeyboardInterrupt
            try:
                result = function(*args, **keywords)
                if left == 1 and function is open_file:
                    os.close(result)  # nobody gets to know this descriptor: not what is tested here
                return result
            finally:
                if left == 1:
                    raise KeyboardInterrupt

        return wrapped

    for owner, names in (
        (os, ("mkdir", "open", "rename", "symlink", "fsync", "chmod", "stat")),
        (fcntl, ("flock",)),
        (shutil, ("copyfile",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))

    def arm(count: int) -> None:
        state["left"] = count

    yield arm
    state["left"] = -1
