"""Images and volumes as parts of a guest: which disks it gets, and what its agent is told."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmlite import ConfigError, Disk, FormattedDisk
from kvmlite.cli.volume import parse_volume
from kvmlite.guest.agent import GuestError
from kvmlite.images.image_store import ImageStore
from kvmlite.images.root_source import import_image
from kvmlite.images.volumes import VolumeStore
from kvmlite.sandbox.root_disk import RootDisk, open_root
from kvmlite.sandbox.volume_mount import VolumeMount, open_volume

pytestmark = pytest.mark.ext4


class Told:
    """Notes what an agent would be told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def mount(self, source: str, target: str, kind: str, data: str = "", flags: int = 0, *, name: str = "") -> None:
        self.lines.append(f"mount {source} {target} {kind} {data} {flags}")

    def change_root(self, directory: str) -> None:
        self.lines.append(f"root {directory}")


def told(part: RootDisk | VolumeMount) -> list[str]:
    agent = Told()
    part.set_up(agent, [0xD0003000])  # type: ignore[arg-type]
    return agent.lines


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image ``one``; its path."""
    (tmp_path / "tree/etc").mkdir(parents=True)
    return import_image(ImageStore(), "one", str(tmp_path / "tree"), size=24 << 20).path


def test_an_image_is_the_root_and_its_writes_are_discarded(image: str) -> None:
    root, _ = open_root("one")
    assert root.devices == (Disk(path=image, overlay="discard", serial="kvmlite-root"),)
    assert not any(device.keeps_writes for device in root.devices)  # type: ignore[attr-defined]
    assert told(root) == ["mount serial:kvmlite-root /mnt ext4  1024", "root /mnt"]


def test_what_is_kept_is_in_a_volume_that_is_made_once(image: str) -> None:
    root, _ = open_root("one", keep="mine")
    volume = VolumeStore().find("mine")
    assert root.devices == (Disk(path=volume.path, serial="kvmlite-root"),)
    assert all(device.keeps_writes for device in root.devices)  # type: ignore[attr-defined]
    with open(volume.path, "r+b") as file:
        file.seek(20 << 20)
        file.write(b"the guest's")
    assert open_root("one", keep="mine")[0] == root
    with open(volume.path, "rb") as file:
        file.seek(20 << 20)
        assert file.read(11) == b"the guest's"


def test_a_volume_of_another_image_is_refused(image: str, tmp_path: Path) -> None:
    import_image(ImageStore(), "two", str(tmp_path / "tree"), size=25 << 20)
    open_root("one", keep="mine")
    with pytest.raises(ConfigError, match="volume mine was not made of image two"):
        open_root("two", keep="mine")
    VolumeStore().create("empty", 1 << 20)
    with pytest.raises(ConfigError, match="volume empty was not made of image one"):
        open_root("one", keep="empty")


def test_a_disk_file_is_a_root_but_keeps_nothing(image: str, tmp_path: Path) -> None:
    root, config = open_root(image)
    assert (root.path, root.partition, root.keep, config.argv([])) == (image, 0, False, [])
    assert told(RootDisk(path=image, partition=3))[0] == "mount serial:kvmlite-root:3 /mnt ext4  1024"
    with pytest.raises(ConfigError, match="nothing can be kept of it"):
        open_root(image, keep="mine")
    with pytest.raises(ConfigError, match="no such disk image"):
        open_root(f"{tmp_path}/none")


def test_a_volume_is_mounted_where_it_is_asked_for() -> None:
    store = VolumeStore()
    volume = store.create("data", 8 << 20, filesystem="ext4")
    part = parse_volume("data:/srv/data")
    assert part == VolumeMount(name="data", path=volume.path, target="/srv/data")
    assert part.devices == (Disk(path=volume.path),)
    assert not part.needs_shared_memory
    assert told(part) == ["mount mmio:d0003000 /srv/data ext4  0"]
    read_only = parse_volume("data:/srv:ro")
    assert read_only.devices == (Disk(path=volume.path, read_only=True),)
    assert told(read_only) == ["mount mmio:d0003000 /srv ext4 noload 1"]


@pytest.mark.qemu_img
class Refuses(Told):
    def mount(self, source: str, target: str, kind: str, data: str = "", flags: int = 0, *, name: str = "") -> None:
        raise GuestError(f"mounting {name}", errno.EINVAL)


def test_a_guest_that_cannot_mount_a_volume_says_which_and_what_to_do() -> None:
    part = VolumeMount(name="data", path="data.qcow2", format="qcow2", target="/srv")
    with pytest.raises(GuestError, match="mounting volume data: Invalid argument") as caught:
        part.set_up(Refuses(), [0xD0003000])  # type: ignore[arg-type]
    assert caught.value.hint.startswith("there is no ext4 file system in it; kvmlite volume create --fs ext4")


def test_a_volume_of_another_format_is_served_by_another_process() -> None:
    volume = VolumeStore().create("data", 8 << 20, format="qcow2", filesystem="ext4")
    part = parse_volume("data:/srv:ro")
    assert part.devices == (FormattedDisk(path=volume.path, format="qcow2", read_only=True),)
    assert part.needs_shared_memory
    assert told(part) == ["mount mmio:d0003000 /srv ext4 noload 1"]


@pytest.mark.parametrize("text", ["data", "data:", ":/x", "data:x", "data:/x:no", "data:/x:ro:rw"])
def test_a_volume_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form NAME:DST"):
        parse_volume(text)


def test_a_volume_that_cannot_be_mounted_is_refused() -> None:
    VolumeStore().create("blank", 1 << 20)
    with pytest.raises(ConfigError, match="volume blank has no ext4 file system"):
        open_volume("blank", "/x")
    with pytest.raises(ConfigError, match="no volume 'none'"):
        open_volume("none", "/x")
