from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmlite.errors import ConfigError, HostError, UnsupportedError
from kvmlite.host.copying import copy_sparse
from kvmlite.host.disk import DiskFile
from kvmlite.images.tool import find_tool
from kvmlite.images.volumes import VolumeStore

GIB = 1 << 30


@pytest.fixture
def store(home: Path) -> Iterator[VolumeStore]:
    store = VolumeStore()
    yield store
    left = os.listdir(store.root) if os.path.isdir(store.root) else []
    assert not [name for name in left if name.startswith(".staging")]


def names(store: VolumeStore) -> list[str]:
    return [volume.name for volume in store.volumes()]


def test_a_raw_volume_is_thin_and_its_owners_own(store: VolumeStore) -> None:
    volume = store.create("data", 100 * GIB)
    assert (volume.name, volume.format, volume.size, volume.allocated, volume.is_used) == (
        "data", "raw", 100 * GIB, 0, False,
    )  # fmt: skip
    assert volume.path == f"{store.root}/data.raw"
    assert os.stat(volume.path).st_mode & 0o777 == 0o600
    assert store.volumes() == (volume,)


def test_a_name_is_taken_whatever_the_format(store: VolumeStore) -> None:
    store.create("data.x", GIB)
    with pytest.raises(ConfigError, match=r"there is a volume 'data.x' already"):
        store.create("data.x", GIB, format="qcow2")
    assert names(store) == ["data.x"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "-x", "x" * 200])
def test_a_bad_name_is_refused(store: VolumeStore, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a volume"):
        store.create(name, GIB)
    assert not os.path.exists(store.root)


def test_an_unknown_volume_is_answered_with_one_that_is_there(store: VolumeStore) -> None:
    with pytest.raises(ConfigError, match="no volume 'dta'") as caught:
        store.find("dta")
    assert "kvmlite volume create" in caught.value.hint
    store.create("data", GIB)
    with pytest.raises(ConfigError) as caught:
        store.remove("dta")
    assert caught.value.hint == "did you mean data?"


def test_it_grows_but_shrinks_only_when_told_to(store: VolumeStore) -> None:
    store.create("data", GIB)
    assert store.resize("data", 3 * GIB).size == 3 * GIB
    with pytest.raises(ConfigError, match="what lies behind would be lost") as caught:
        store.resize("data", 2 * GIB)
    assert "--shrink" in caught.value.hint
    assert store.resize("data", 2 * GIB, shrink=True).size == 2 * GIB


@pytest.mark.parametrize("read_only", [False, True])
def test_a_volume_in_use_is_left_alone(store: VolumeStore, read_only: bool) -> None:
    volume = store.create("data", GIB)
    disk = DiskFile(volume.path, read_only=read_only)
    try:
        assert store.find("data").is_used
        for change in (
            lambda: store.resize("data", 2 * GIB),
            lambda: store.convert("data", "qcow2"),
            lambda: store.remove("data"),
        ):
            with pytest.raises(HostError, match="volume data is in use: a virtual machine has it") as caught:
                change()
            assert caught.value.hint == "end that machine first"
        assert store.find("data").size == GIB
    finally:
        disk.close()
    store.remove("data")
    assert names(store) == []


def test_looking_at_a_volume_does_not_lock_it(store: VolumeStore) -> None:
    volume = store.create("data", GIB)
    disk = DiskFile(volume.path)
    disk.close()
    assert not store.find("data").is_used


@pytest.mark.ext4
def test_a_file_system_is_made_in_it_and_stays_thin(store: VolumeStore) -> None:
    volume = store.create("data", 20 * GIB, filesystem="ext4")
    tool = find_tool("e2fsck")
    assert tool
    assert subprocess.run([tool, "-fn", volume.path], check=False, capture_output=True).returncode == 0
    assert volume.allocated < 8 << 20
    with open(volume.path, "rb") as file:
        assert file.read(2048)[1024 + 0x5C] & 4  # s_feature_compat: has_journal


def test_what_makes_no_sense_is_refused(store: VolumeStore) -> None:
    with pytest.raises(ConfigError, match="unknown disk format 'iso'"):
        store.create("data", GIB, format="iso")
    with pytest.raises(ConfigError, match="cannot make a file system 'ntfs'"):
        store.create("data", GIB, filesystem="ntfs")
    with pytest.raises(ConfigError, match="too small"):
        store.create("data", 512)


def test_without_qemu_img_its_package_is_named(store: VolumeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmlite.images.tool.find_tool", lambda name: None)
    with pytest.raises(UnsupportedError, match="no qemu-img on this host") as caught:
        store.create("data", GIB, format="qcow2")
    assert caught.value.hint == "apt-get install qemu-utils"


@pytest.mark.qemu_img
@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_other_formats_are_made_and_converted_with_their_contents(store: VolumeStore, format: str) -> None:
    volume = store.create("data", 8 << 20)
    with open(volume.path, "r+b") as file:
        file.seek(5 << 20)
        file.write(b"payload")
    other = store.convert("data", format)
    assert (other.name, other.format, other.size) == ("data", format, 8 << 20)
    assert not os.path.exists(volume.path)
    back = store.convert("data", "raw", target="copy")
    with open(back.path, "rb") as file:
        file.seek(5 << 20)
        assert file.read(7) == b"payload"
    assert names(store) == ["copy", "data"]
    assert store.create("empty", 8 << 20, format=format).allocated < 4 << 20
    for made in store.volumes():
        assert os.stat(made.path).st_mode & 0o777 == 0o600  # whatever program made it


@pytest.mark.qemu_img
def test_a_qcow2_volume_is_resized_by_qemu_img(store: VolumeStore) -> None:
    store.create("data", GIB, format="qcow2")
    assert store.resize("data", 2 * GIB).size == 2 * GIB
    assert store.resize("data", GIB, shrink=True).size == GIB
    store.convert("data", "vdi")
    with pytest.raises(ConfigError, match="the size of a vdi volume is fixed"):
        store.resize("data", 2 * GIB)


@pytest.mark.qemu_img
def test_a_raw_volume_that_says_qcow2_inside_stays_raw(store: VolumeStore) -> None:
    """A guest that writes a qcow2 header naming a host file as its backing file must not get to read that."""
    volume = store.create("data", 1 << 20)
    secret = Path(store.root, "secret")
    secret.write_text("the host's")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), f"{volume.path}.x", "1M"],
        check=True,
    )
    header = Path(f"{volume.path}.x").read_bytes()
    Path(f"{volume.path}.x").unlink()
    with open(volume.path, "r+b") as file:
        file.write(header[: 1 << 16])
    converted = store.convert("data", "vdi", target="other")
    back = store.convert("other", "raw")
    assert Path(back.path).read_bytes()[: 1 << 16] == header[: 1 << 16]
    assert converted.size == 1 << 20


def test_a_copy_has_the_data_and_the_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.write(b"begin")
        file.seek(64 << 20)
        file.write(b"middle")
        file.truncate(200 << 20)
    copy_sparse(str(source), str(target))
    with target.open("rb") as file:
        assert file.read(5) == b"begin"
        file.seek(64 << 20)
        assert file.read(6) == b"middle"
    found = target.stat()
    assert (found.st_size, found.st_mode & 0o777) == (200 << 20, 0o600)
    assert found.st_blocks * 512 < 1 << 20
