from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmlite.errors import ConfigError, ImageError
from kvmlite.images.initramfs import Initramfs, build_base, build_overlay
from kvmlite.images.initramfs_cache import BaseCache
from kvmlite.images.kernels import kernel_at

FEATURES = ("rng", "mmio", "ext4", "9p")


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Parse newc back: name to mode and data."""
    found, offset = {}, 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[offset + 6 + 8 * index : offset + 14 + 8 * index], 16) for index in range(13)]
        name = archive[offset + 110 : offset + 110 + fields[11] - 1].decode()
        offset = (offset + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            assert offset == len(archive)
            return found
        found[name] = (fields[1], archive[offset : offset + fields[6]])
        offset = (offset + fields[6] + 3) & ~3


class Setup:
    """A kernel, an agent and a busybox of a few bytes, and the cache they are built into."""

    def __init__(self, tmp_path: Path, home: Path, images: Any) -> None:
        self.package = images.package(tmp_path / "p")
        self.kernel = kernel_at(str(self.package))
        self.modules = Path(self.kernel.modules_dir or "")
        self.agent = tmp_path / "agent"
        self.agent.write_bytes(b"\x7fELFagent")
        self.busybox = tmp_path / "busybox"
        self.busybox.write_bytes(b"\x7fELFbusybox")
        self.cache = home / "cache/initramfs"

    def build(self, **keywords: Any) -> Initramfs:
        base = build_base(self.kernel, FEATURES, agent=str(self.agent), busybox=str(self.busybox), **keywords)
        assert base.size == os.path.getsize(base.path)
        return base

    def archives(self) -> list[str]:
        return sorted(name for name in os.listdir(self.cache) if name.endswith(".cpio"))


@pytest.fixture
def setup(tmp_path: Path, home: Path, images: Any, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr("kvmlite.images.busybox.applets", lambda path: ("bin/busybox", "bin/sh", "linuxrc", "sbin/ip"))
    return Setup(tmp_path, home, images)


def test_the_base_has_what_the_agent_expects(setup: Setup, images: Any) -> None:
    base = setup.build()
    files = unpack(Path(base.path).read_bytes())
    assert files["init"] == (0o100755, b"\x7fELFagent")
    assert files["bin/busybox"] == (0o100755, b"\x7fELFbusybox")
    assert files["bin/sh"] == (0o120777, b"/bin/busybox")
    assert files["sbin/ip"] == (0o120777, b"/bin/busybox")
    assert files["dev/console"][0] == 0o020600
    assert files["tmp"][0] == 0o041777
    assert files["etc/passwd"][1].startswith(b"root:x:0:0:root:/root:/bin/sh\n")
    assert files["kvmlite/modules"] == (
        0o100644,
        b"/kvmlite/modules.d/virtio_ring.ko\n/kvmlite/modules.d/virtio.ko\n"
        b"/kvmlite/modules.d/virtio_mmio.ko\n/kvmlite/modules.d/virtio_rng.ko\n",
    )
    assert files["kvmlite/modules.d/virtio_rng.ko"] == (0o100644, images.module("virtio"))
    assert base.modules == ("virtio_ring", "virtio", "virtio_mmio", "virtio_rng")
    assert (base.builtin, base.missing, base.unknown, base.memfd) == (("ext4",), ("9pnet_virtio", "9p"), (), -1)
    assert base.has_module("ext4")
    assert not base.has_module("9p")


def test_the_same_inputs_are_built_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    first = setup.build()
    monkeypatch.setattr("kvmlite.images.initramfs.plan_modules", lambda *_, **__: pytest.fail("built again"))
    assert setup.build() == first


def test_the_same_tree_gives_the_same_bytes(setup: Setup) -> None:
    first = setup.build()
    for name in os.listdir(setup.cache):
        os.unlink(setup.cache / name)
    assert setup.build().path == first.path


@pytest.mark.parametrize(
    "change",
    [
        lambda setup, images: setup.agent.write_bytes(b"\x7fELFagent2"),
        lambda setup, images: setup.busybox.write_bytes(b"\x7fELFbusybox2"),
        lambda setup, images: (setup.modules / "kernel/drivers/virtio/virtio.ko").write_bytes(
            images.module("virtio_ring", softdep="post: x")
        ),
    ],
)
def test_a_changed_input_is_noticed(setup: Setup, images: Any, change: Any) -> None:
    before = setup.build()
    change(setup, images)
    assert setup.build().path != before.path


def test_an_installed_module_that_was_missing_is_noticed(setup: Setup, images: Any) -> None:
    assert "9p" in setup.build().missing
    images.install_modules(
        setup.package, {**images.VIRTIO, "fs/9p.ko": images.module(), "net/9pnet_virtio.ko": images.module()}
    )
    assert "9p" in setup.build().modules


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"archive": 1}', b'{"archive": "x", "inputs": [[]]}'])
def test_a_damaged_cache_entry_is_built_again(setup: Setup, damage: bytes) -> None:
    first = setup.build()
    (entry,) = [name for name in os.listdir(setup.cache) if name.endswith(".json")]
    (setup.cache / entry).write_bytes(damage)
    assert setup.build() == first


def test_a_truncated_archive_is_built_again(setup: Setup) -> None:
    first = setup.build()
    os.truncate(first.path, 100)
    assert setup.build() == first


def test_a_cache_that_cannot_be_written_is_no_error(setup: Setup, home: Path) -> None:
    home.mkdir()
    (home / "cache").write_text("a file in the way")
    base = setup.build()
    assert base.memfd >= 0
    assert unpack(Path(base.path).read_bytes())["init"][1] == b"\x7fELFagent"
    base.close()
    assert not os.path.exists(base.path)


def test_a_full_disk_is_no_error_and_leaves_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvmlite.images.initramfs_cache.sync_file", full)
    base = setup.build()
    assert base.memfd >= 0
    assert os.listdir(setup.cache) == []
    base.close()


def test_ctrl_c_at_any_moment_leaves_no_staging(setup: Setup, interrupts: Callable[[int], None]) -> None:
    for count in range(1000):
        interrupts(count)
        try:
            setup.build()
            break
        except KeyboardInterrupt:
            continue
        finally:
            interrupts(-1)
            if setup.cache.exists():
                assert not [name for name in os.listdir(setup.cache) if name.startswith(".")], count
    assert count > 20


def test_archives_used_least_recently_go_first(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for number in range(4):
        path = setup.build(extra={"/number": bytes([number])}).path
        os.utime(path, (1000 + number, 1000 + number))
        paths.append(path)
    setup.build(extra={"/number": b"\0"})
    size = os.path.getsize(paths[0])
    BaseCache(max_size=2 * size)._evict(keep="")
    assert setup.archives() == sorted([os.path.basename(paths[0]), os.path.basename(paths[3])])
    assert len(os.listdir(setup.cache)) == 4


def test_archives_just_used_stay(setup: Setup) -> None:
    setup.build()
    BaseCache(max_size=0)._evict(keep="")
    assert len(setup.archives()) == 1


def test_concurrent_builds_give_the_same_archive(setup: Setup) -> None:
    import threading

    found: list[Initramfs] = []
    threads = [threading.Thread(target=lambda: found.append(setup.build())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    assert len(os.listdir(setup.cache)) == 2


def test_extra_files_are_bytes_or_files_of_the_host(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    (tmp_path / "script").chmod(0o700)
    files = unpack(Path(setup.build(extra={"/opt/a": b"x", "/opt/b": str(tmp_path / "script")}).path).read_bytes())
    assert files["opt/a"] == (0o100644, b"x")
    assert files["opt/b"] == (0o100755, b"#!/bin/sh\n")
    assert files["opt"][0] == 0o040755


def test_extra_files_cannot_take_the_place_of_ours(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/init is in the guest's initial file system twice"):
        setup.build(extra={"/init": b""})
    with pytest.raises(ImageError, match=r"cannot read .*/gone \(for /x in the guest\)"):
        setup.build(extra={"/x": str(tmp_path / "gone")})


def test_an_agent_that_is_no_program_is_refused(setup: Setup) -> None:
    setup.agent.write_text("hello")
    with pytest.raises(ImageError, match=r"the guest agent .*agent is not an ELF program"):
        setup.build()
    setup.agent.unlink()
    with pytest.raises(ImageError, match="cannot read the guest agent"):
        setup.build()


def test_a_truncated_module_is_refused(setup: Setup) -> None:
    os.truncate(setup.modules / "kernel/drivers/virtio/virtio_mmio.ko", 200)
    with pytest.raises(ImageError, match=r"virtio_mmio\.ko is damaged: truncated"):
        setup.build()
    assert not setup.cache.exists()


def test_the_overlay_has_the_settings() -> None:
    files = unpack(build_overlay({"port": "1024", "host.name": "a b"}, {"/etc/motd": b"hi"}))
    assert files["kvmlite/agent.conf"] == (0o100600, b"port=1024\nhost.name=a b\n")
    assert files["etc/motd"] == (0o100644, b"hi")


@pytest.mark.parametrize(
    ("name", "value"), [("", "x"), ("a b", "x"), ("a=b", "x"), ("a", "x\ny=z"), ("a", "\0"), ("ä", "x")]
)
def test_a_setting_that_is_no_single_line_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match="is not a single line of text"):
        build_overlay({name: value})
