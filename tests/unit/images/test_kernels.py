from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvmlite.errors import ConfigError, ImageError
from kvmlite.images import kernels
from kvmlite.images.kernel_file import identify
from kvmlite.images.kernel_source import add_kernel
from kvmlite.images.kernels import kernel_at, locate, resolve
from kvmlite.images.store import KernelStore

pytestmark = pytest.mark.usefixtures("home")


def vmlinux(text: bytes) -> bytes:
    """An ELF with one PT_LOAD segment, laid out as the kernel's (virtual = physical + 0xffffffff80000000)."""
    import struct

    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = 120 + len(text)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, 0xFFFFFFFF81000000, 0x1000000, size, size, 4096) + text


def test_a_bzimage_tells_its_release(tmp_path: Path, images: Any) -> None:
    (tmp_path / "k").write_bytes(images.bzimage("6.12.9-test"))
    found = identify(str(tmp_path / "k"))
    assert (found.is_bzimage, found.release) == (True, "6.12.9-test")


@pytest.mark.parametrize("release", ["", "..", "a/b", "x" * 65, "."])
def test_a_release_that_could_be_no_directory_counts_as_none(tmp_path: Path, images: Any, release: str) -> None:
    (tmp_path / "k").write_bytes(images.bzimage(release))
    assert identify(str(tmp_path / "k")).release == ""


def test_a_vmlinux_tells_its_release_in_its_banner(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(vmlinux(b"\0Linux version %s\0Linux version 6.9.0-x (me@host) (gcc) #1\n\0"))
    found = identify(str(tmp_path / "k"))
    assert (found.is_bzimage, found.release) == (False, "6.9.0-x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"#!/bin/sh\necho\n" * 100, "script"),
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0" + bytes(100), "AArch64|ARM|arm64|machine"),
    ],
)
def test_a_file_that_is_no_kernel_says_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        resolve(str(tmp_path / "k"))


def test_a_truncated_kernel_is_not_added(tmp_path: Path, images: Any) -> None:
    (tmp_path / "k").write_bytes(images.bzimage()[:-1])
    store = KernelStore()
    with pytest.raises(ImageError, match="truncated bzImage"):
        add_kernel(store, str(tmp_path / "k"))
    assert os.listdir(store.root) == []


def test_a_kernel_in_an_unpacked_package_finds_its_modules_and_config(tmp_path: Path, images: Any) -> None:
    tree = images.package(tmp_path / "p")
    for path in (tree, tree / f"boot/vmlinuz-{images.RELEASE}"):
        kernel = resolve(path)
        assert kernel.path == f"{tree}/boot/vmlinuz-{images.RELEASE}"
        assert kernel.modules_dir == f"{tree}/lib/modules/{images.RELEASE}"
        assert kernel.config == f"{tree}/boot/config-{images.RELEASE}"
        assert (kernel.digest, kernel.name) == ("", str(path))


def test_modules_of_another_release_are_not_taken(tmp_path: Path, images: Any) -> None:
    tree = images.package(tmp_path / "p")
    os.rename(tree / f"lib/modules/{images.RELEASE}", tree / "lib/modules/6.0.0")
    assert resolve(tree).modules_dir is None


def test_a_link_is_followed_to_find_modules(tmp_path: Path, images: Any) -> None:
    tree = images.package(tmp_path / "p")
    (tmp_path / "vmlinuz").symlink_to(tree / f"boot/vmlinuz-{images.RELEASE}")
    assert resolve(str(tmp_path / "vmlinuz")).modules_dir == f"{tree}/lib/modules/{images.RELEASE}"


def build_tree(root: Path, images: Any) -> Path:
    (root / "arch/x86/boot").mkdir(parents=True)
    (root / "arch/x86/boot/bzImage").write_bytes(images.bzimage())
    (root / "include/config").mkdir(parents=True)
    (root / "include/config/kernel.release").write_text(images.RELEASE + "\n")
    (root / ".config").write_text("CONFIG_EXT4_FS=y\n")
    (root / "fs").mkdir()
    (root / "fs/a.ko").write_bytes(images.module())
    (root / "modules.order").write_text("fs/a.o\n")
    (root / "modules.builtin").write_text("fs/ext4/ext4.o\n")
    return root


def test_a_build_tree_can_be_used_as_it_is(tmp_path: Path, images: Any) -> None:
    tree = build_tree(tmp_path / "linux", images)
    kernel = resolve(tree)
    assert (kernel.path, kernel.modules_dir, kernel.config) == (
        f"{tree}/arch/x86/boot/bzImage",
        str(tree),
        f"{tree}/.config",
    )


def test_an_added_build_tree_is_laid_out_like_an_installed_one(
    tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmlite.images.kernel_source._run_depmod", lambda *_: None)
    kernel = add_kernel(KernelStore(), str(build_tree(tmp_path / "linux", images)))
    assert kernel.modules_dir is not None
    modules = Path(kernel.modules_dir)
    assert (modules / "modules.order").read_text() == "kernel/fs/a.ko\n"
    assert (modules / "modules.builtin").read_text() == "kernel/ext4.ko\n"
    assert (modules / "kernel/fs/a.ko").read_bytes() == images.module()


def test_modules_may_be_given_by_hand(tmp_path: Path, images: Any) -> None:
    (tmp_path / "k").write_bytes(images.bzimage())
    directory = images.install_modules(tmp_path / "m", images.VIRTIO)
    (directory / "build").symlink_to("/nowhere")
    for given in (tmp_path / "m", directory, directory.parent):
        kernel = add_kernel(KernelStore(), str(tmp_path / "k"), modules=str(given))
        assert sorted(os.listdir(kernel.modules_dir or "")) == ["kernel", "modules.builtin", "modules.order"]


def test_modules_of_another_kernel_are_refused(tmp_path: Path, images: Any) -> None:
    (tmp_path / "k").write_bytes(images.bzimage())
    directory = images.install_modules(tmp_path / "m", {"a.ko": images.module(release="5.1.0")})
    with pytest.raises(ImageError, match=r"a\.ko is built for kernel 5\.1\.0"):
        add_kernel(KernelStore(), str(tmp_path / "k"), modules=str(directory))


def test_a_directory_without_modules_is_refused(tmp_path: Path, images: Any) -> None:
    (tmp_path / "k").write_bytes(images.bzimage())
    (tmp_path / "m").mkdir()
    with pytest.raises(ImageError, match="holds no modules"):
        add_kernel(KernelStore(), str(tmp_path / "k"), modules=str(tmp_path / "m"))


def test_a_listed_module_that_is_not_there_is_named(tmp_path: Path, images: Any) -> None:
    tree = images.package(tmp_path / "p")
    directory = tree / f"lib/modules/{images.RELEASE}"
    (directory / "modules.dep").write_text("kernel/drivers/virtio/virtio.ko:\nkernel/gone.ko:\n")
    with pytest.raises(ImageError, match=r"gone\.ko is listed but not there"):
        add_kernel(KernelStore(), str(tree))


def test_a_directory_without_a_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"has no kernel: no arch/x86/boot/bzImage") as caught:
        kernel_at(str(tmp_path))
    assert "make bzImage" in caught.value.hint


def test_a_directory_with_two_kernels_asks_which(tmp_path: Path, images: Any) -> None:
    tree = images.package(tmp_path / "p")
    (tree / "boot/vmlinuz-2").write_bytes(b"")
    with pytest.raises(ImageError, match=r"has 2 kernels: .*vmlinuz-2, .*vmlinuz-6"):
        locate(str(tree))


def test_a_name_in_the_store_wins_over_a_file_of_that_name(
    tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k").write_bytes(images.bzimage("6.2.0"))
    assert resolve("k").path == str(tmp_path / "k")
    added = add_kernel(KernelStore(), str(images.package(tmp_path / "p")), name="k")
    assert resolve("k") == added
    assert resolve("./k").path == str(tmp_path / "k")


def test_without_a_name_the_default_of_the_store_is_taken(tmp_path: Path, images: Any) -> None:
    assert add_kernel(KernelStore(), str(images.package(tmp_path / "p"))) == resolve()


def test_with_an_empty_store_the_host_s_own_kernel_is_taken(
    tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = images.package(tmp_path / "p")
    own = kernel_at(str(tree))
    monkeypatch.setattr(kernels, "host_kernel", lambda: own)
    assert resolve() is own


def test_with_nothing_at_all_the_error_says_how_to_get_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: type("U", (), {"release": "0.0.0-no-such-kernel"}))
    with pytest.raises(
        ConfigError, match=r"no kernel to run: the store is empty, and the host has no /boot/vmlinuz-0\.0\.0"
    ) as caught:
        resolve()
    assert caught.value.hint == "kvmlite kernel add"


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="the kernel's name is empty"):
        resolve("")


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        resolve(str(tmp_path / "k"))
    with pytest.raises(ConfigError, match="no such file or directory"):
        add_kernel(KernelStore(), str(tmp_path / "k"))
