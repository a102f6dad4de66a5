from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.partitioned import LINUX, ROOT_X86_64, gpt_disk

from kvmlite.errors import ConfigError, ImageError, UnsupportedError
from kvmlite.images.disk_kernel import find_disk_kernel, find_root_partition
from kvmlite.images.kernels import kernel_at
from kvmlite.images.tool import find_tool

pytestmark = pytest.mark.ext4

RELEASE = "6.1.0-7-cloud-amd64"


def mkfs(tree: Path, kind: str = "ext4") -> Path:
    tool = find_tool("mke2fs")
    assert tool
    image = tree.with_name(f"{tree.name}.img")
    subprocess.run([tool, "-q", "-F", "-t", kind, "-d", str(tree), str(image), "16M"], check=True)
    return image


@pytest.fixture
def root(tmp_path: Path, images: Any) -> Path:
    """A root with a kernel in /boot, GRUB's configuration, modules and a module that none of our guests wants."""
    tree: Path = images.package(
        tmp_path / "root",
        release=RELEASE,
        modules={"virtio_blk.ko": images.module(release=RELEASE), "unrelated.ko": images.module(release=RELEASE)},
    )
    modules = tree / "lib/modules" / RELEASE
    (modules / "modules.dep").write_text("kernel/virtio_blk.ko:\nkernel/unrelated.ko:\n")
    (tree / "etc").mkdir()
    (tree / "boot/grub").mkdir()
    (tree / "boot/grub/grub.cfg").write_text(
        f"menuentry 'x' {{\n linux /boot/vmlinuz-{RELEASE} root=/dev/sda1 ro net.ifnames=0\n}}\n"
    )
    return tree


def test_grubs_kernel_is_found_with_the_modules_a_guest_may_want(root: Path, home: Path, images: Any) -> None:
    found = find_disk_kernel(str(mkfs(root)))
    assert found.arguments == ("net.ifnames=0",)
    kernel = kernel_at(found.directory)
    assert kernel.release == RELEASE
    assert Path(kernel.path).read_bytes() == images.bzimage(release=RELEASE)
    assert kernel.modules_dir == f"{found.directory}/lib/modules/{RELEASE}"
    assert kernel.config == f"{found.directory}/boot/config-{RELEASE}"
    assert "virtio_blk.ko" in os.listdir(f"{kernel.modules_dir}/kernel")
    assert "unrelated.ko" not in os.listdir(f"{kernel.modules_dir}/kernel")
    assert not [name for name in os.listdir(home / "cache/disk-kernels") if name.startswith(".staging")]


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_partition_is_read_where_it_is(root: Path, tmp_path: Path, home: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    disk = gpt_disk(tmp_path / "disk", [(LINUX, mkfs(tmp_path / "data")), (ROOT_X86_64, mkfs(root, kind))])
    assert find_root_partition(str(disk)) == 2
    assert kernel_at(find_disk_kernel(str(disk)).directory).release == RELEASE


def test_a_boot_partition_with_bls_entries_is_understood(root: Path, tmp_path: Path, home: Path) -> None:
    boot = tmp_path / "bootpart"
    (root / "boot").rename(boot)
    (root / "boot").mkdir()
    (boot / "loader/entries").mkdir(parents=True)
    (boot / "loader/entries/a-1.conf").write_text("linux /nowhere\n")
    (boot / "loader/entries/a-2.conf").write_text(f"linux /vmlinuz-{RELEASE}\noptions root=/dev/vda2 audit=0\n")
    disk = gpt_disk(tmp_path / "disk", [(LINUX, mkfs(boot)), (LINUX, mkfs(root))])
    found = find_disk_kernel(str(disk))
    assert found.arguments == ("audit=0",)
    assert kernel_at(found.directory).modules_dir
    assert find_root_partition(str(disk)) == 2


def test_without_a_loader_the_newest_kernel_in_boot_is_taken(root: Path, home: Path) -> None:
    (root / "boot/grub/grub.cfg").unlink()
    (root / "boot/vmlinuz-6.1.0-10-older-looking").write_bytes(b"not a kernel")
    (root / "boot/vmlinuz-6.1.0-10-older-looking").rename(root / "boot/vmlinuz-5.10.0-99")
    found = find_disk_kernel(str(mkfs(root)))
    assert json.loads(Path(found.directory, "found.json").read_text())["kernel"] == f"/boot/vmlinuz-{RELEASE}"


def test_links_are_followed_inside_the_image(root: Path, home: Path) -> None:
    (root / "boot/vmlinuz").symlink_to(f"/boot/./vmlinuz-{RELEASE}")
    (root / "boot/grub/grub.cfg").write_text("menuentry x {\nlinux /boot/vmlinuz\n}\n")
    (root / "usr").mkdir()
    (root / "lib").rename(root / "usr/lib")
    (root / "lib").symlink_to("usr/lib")
    assert kernel_at(find_disk_kernel(str(mkfs(root))).directory).modules_dir


def test_a_link_out_of_the_image_leads_nowhere(root: Path, home: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"the host's")
    (root / "boot/vmlinuz").symlink_to(f"../../../../../../../..{secret}")
    (root / "boot/grub/grub.cfg").write_text("menuentry x {\nlinux /boot/vmlinuz\n}\n")
    (root / f"boot/vmlinuz-{RELEASE}").unlink()
    with pytest.raises(ImageError, match="holds no kernel"):
        find_disk_kernel(str(mkfs(root)))


@pytest.mark.parametrize("name", ["a b", 'a"b', "../../x"])
def test_names_that_debugfs_would_misread_are_not_looked_at(root: Path, home: Path, name: str, tmp_path: Path) -> None:
    (root / "boot/grub/grub.cfg").write_text(f"menuentry x {{\nlinux /boot/{name}\n}}\n")
    before = sorted(os.listdir(tmp_path))
    found = find_disk_kernel(str(mkfs(root)))
    assert json.loads(Path(found.directory, "found.json").read_text())["kernel"] == f"/boot/vmlinuz-{RELEASE}"
    assert sorted(os.listdir(tmp_path)) == sorted({*before, "root.img", "home"})


def test_an_image_that_never_changes_is_read_once(root: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = str(mkfs(root))
    first = find_disk_kernel(image, "d" * 64)
    monkeypatch.setattr("kvmlite.images.disk_kernel._extract", lambda *_: pytest.fail("read again"))
    assert find_disk_kernel(image, "d" * 64) == first


def test_modules_without_an_index_are_refused(root: Path, home: Path) -> None:
    (root / "lib/modules" / RELEASE / "modules.dep").unlink()
    with pytest.raises(ImageError, match=r"has no modules\.dep"):
        find_disk_kernel(str(mkfs(root)))


def test_modules_dep_that_leads_outside_is_refused(root: Path, home: Path) -> None:
    (root / "lib/modules" / RELEASE / "modules.dep").write_text(
        "virtio_blk.ko: ../../../../evil.ko\n../../../../evil.ko:\n"
    )
    with pytest.raises(ImageError, match="is damaged"):
        find_disk_kernel(str(mkfs(root)))


def make_empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return mkfs(tmp_path / "empty")


def make_rootless(tmp_path: Path) -> Path:
    (tmp_path / "x/etc").mkdir(parents=True)
    return mkfs(tmp_path / "x")


def make_foreign(tmp_path: Path) -> Path:
    (tmp_path / "xfs").write_bytes(b"XFSB".ljust(1 << 20, b"\0"))
    return gpt_disk(tmp_path / "disk", [(LINUX, tmp_path / "xfs")])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (make_empty, UnsupportedError, "looks like a root"),
        (make_rootless, ImageError, "holds no kernel"),
        (make_foreign, UnsupportedError, "has no ext2, ext3 or ext4 file system"),
    ],
)
def test_a_disk_without_a_kernel_is_refused(
    tmp_path: Path, home: Path, make: Callable[[Path], Path], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_disk_kernel(str(make(tmp_path)))


def test_a_path_that_debugfs_would_misread_is_refused(home: Path, tmp_path: Path) -> None:
    image = make_empty(tmp_path).rename(tmp_path / "what?offset=1")
    with pytest.raises(ConfigError, match="debugfs cannot open"):
        find_disk_kernel(str(image))
