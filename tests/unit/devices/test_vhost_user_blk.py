"""Disks by qemu-storage-daemon: every format, a daemon that dies, images that would lead it to other files."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from kvmlite import ConfigError, FormattedDisk, HostError, ImageError
from kvmlite.devices import vhost_user
from kvmlite.devices.vhost_user_blk import FORMATS, daemon_options
from kvmlite.testing import VirtioRig

PATIENCE_S = 60.0
MIB = 1 << 20
IN, OUT, FLUSH = 0, 1, 4


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a daemon that has closed the connection says at its end is waited for, however busy the host is."""
    monkeypatch.setattr(vhost_user, "_LAST_WORDS_S", PATIENCE_S)


def make_image(path: Path, format: str, *options: str) -> Path:
    command = ["qemu-img", "create", "-q", "-f", format, *options, str(path)]
    subprocess.run([*command, "8M"], check=True, capture_output=True)
    return path


def ask(rig: VirtioRig, kind: int, sector: int = 0, data: bytes = b"", size: int = 0) -> tuple[int, bytes]:
    """Return (status, data read)."""
    queue = rig.queues[0]
    where = queue.allocate(bytes(size + 1))
    header = struct.pack("<IIQ", kind, 0, sector)
    buffers = [(queue.allocate(header + data), len(header + data), 0), (where, size + 1, 2)]
    queue.add_buffers(buffers)
    rig.driver.notify(0)
    deadline = time.monotonic() + PATIENCE_S
    while queue.take_used() is None:
        assert time.monotonic() < deadline, rig.warnings
        rig.loop.run()
        time.sleep(0.001)
    answer = rig.memory.read(where, size + 1)
    return answer[-1], answer[:-1]


def kill(rig: VirtioRig) -> None:
    os.kill(rig.device._back_end.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    deadline = time.monotonic() + PATIENCE_S
    while not rig.warnings:
        assert time.monotonic() < deadline
        rig.loop.run()
        time.sleep(0.001)


@pytest.mark.tools
@pytest.mark.qemu_img
@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_of_each_format_keeps_what_is_written(tmp_path: Path, format: str) -> None:
    path = make_image(tmp_path / f"an image, with=commas.{format}", format)
    with VirtioRig(FormattedDisk(path=path, format=format).attach, memory_backing="memfd") as rig:
        rig.start()
        assert struct.unpack("<Q", rig.driver.read_config(0, 8)) == (8 * MIB // 512,)
        assert ask(rig, OUT, 3, b"q" * 512)[0] == 0
        assert ask(rig, FLUSH)[0] == 0
        assert not rig.warnings
    with VirtioRig(FormattedDisk(path=path, format=format, read_only=True).attach, memory_backing="memfd") as rig:
        rig.start()
        assert ask(rig, IN, 3, size=512) == (0, b"q" * 512)
        assert ask(rig, OUT, 3, b"z" * 512)[0] != 0
        assert rig.driver.read_features() >> 5 & 1
        kill(rig)
        assert ask(rig, IN, 3, size=512) == (0, b"q" * 512)
        assert "qemu-storage-daemon was killed (SIGKILL); it was started again" in rig.warnings[0]


@pytest.mark.tools
@pytest.mark.qemu_img
def test_a_disk_that_was_written_fails_for_good_with_its_daemon(tmp_path: Path) -> None:
    path = make_image(tmp_path / "x.qcow2", "qcow2")
    with VirtioRig(FormattedDisk(path=path, format="qcow2").attach, memory_backing="memfd") as rig:
        rig.start()
        assert ask(rig, OUT, 0, b"q" * 512)[0] == 0
        kill(rig)
        assert ask(rig, IN, 0, size=512)[0] == 1
        rig.restart()
        assert ask(rig, IN, 0, size=512)[0] == 1
        assert len(rig.warnings) == 1
        assert "writes that it had not stored yet are lost with it" in rig.warnings[0]


@pytest.mark.tools
@pytest.mark.qemu_img
def test_the_daemons_own_words_say_why_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(MIB))
    with pytest.raises(HostError) as caught:
        VirtioRig(FormattedDisk(path=tmp_path / "x", format="vhdx").attach, memory_backing="memfd")
    text = str(caught.value)
    assert text.startswith("device0: qemu-storage-daemon ended with status 1: ")
    assert "{" not in text
    path = make_image(tmp_path / "y", "qcow2")
    disk = FormattedDisk(path=path, format="qcow2")
    with VirtioRig(disk.attach, memory_backing="memfd"):
        with pytest.raises(HostError, match=r"status 1: Failed to get .* lock; Is another process using the image"):
            VirtioRig(disk.attach, memory_backing="memfd")


def test_a_missing_daemon_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").touch()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="qemu-storage-daemon is not installed") as caught:
        VirtioRig(FormattedDisk(path=tmp_path / "x", format="raw").attach, memory_backing="memfd")
    assert caught.value.hint == "apt-get install qemu-utils"


def test_options_are_json_and_say_the_format() -> None:
    disk = FormattedDisk(path="/x", format="qcow2", read_only=True, direct=True, queues=2)
    options = daemon_options(disk, '/a,"b', 7, is_device=False)
    file, image, export = (json.loads(text) for text in options[1::2])
    assert options[::2] == ["--blockdev", "--blockdev", "--export"]
    assert (file["driver"], file["filename"], file["read-only"], file["cache"]) == (
        "file",
        '/a,"b',
        True,
        {"direct": True},
    )
    assert (image["driver"], image["backing"]) == ("qcow2", None)
    assert (export["writable"], export["addr"], export["num-queues"]) == (False, {"type": "fd", "str": "7"}, 2)
    device = json.loads(daemon_options(disk, "/dev/x", 7, is_device=True)[1])
    assert device["driver"] == "host_device"


QCOW2 = struct.pack(">4sIQI", b"QFI\xfb", 3, 0, 0).ljust(512, b"\0")
SPARSE = b"KDMV".ljust(28, b"\0") + struct.pack("<QQ", 1, 1) + bytes(512 - 44)
TEXT = b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n"

REFERENCES = {
    "backing file": ("qcow2", struct.pack(">4sIQI", b"QFI\xfb", 2, 104, 11), "has a backing file"),
    "external data": ("qcow2", QCOW2[:72] + struct.pack(">Q", 4) + QCOW2[80:], "keeps its data in another file"),
    "no qcow2": ("qcow2", b"KDMV" + bytes(508), "is not a qcow2 image"),
    "cut short": ("qcow2", b"QFI\xfb", "is not a qcow2 image"),
    "extent elsewhere": ("vmdk", TEXT + b'RW 8 FLAT "/etc/shadow" 0\n', "keeps its data elsewhere, in '/etc/shadow'"),
    "extent above": ("vmdk", TEXT + b'  rw 8 FLAT   "../x" 0\n', "keeps its data elsewhere"),
    "inner text": ("vmdk", SPARSE + TEXT + b'RDONLY 8 SPARSE "/x"\n', "keeps its data elsewhere"),
    "difference": ("vmdk", b"# Disk DescriptorFile\nparentCID=12ab34cd\n", "is the difference to another image"),
    "parent named": ("vmdk", TEXT + b'parentFileNameHint="/x"\n', "is the difference to another image"),
    "old kind": ("vmdk", b"COWD" + bytes(508), "of an old kind"),
    "no vmdk": ("vmdk", bytes(512), "is not a VMDK image"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_an_image_that_names_other_files_is_refused(tmp_path: Path, name: str) -> None:
    format, content, message = REFERENCES[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        VirtioRig(FormattedDisk(path=tmp_path / "x", format=format).attach, memory_backing="memfd")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "auto"}, "format 'auto' is unknown"),
        ({"path": ""}, "path '' cannot be"),
        ({"queues": 0}, "0 queues, allowed are 1 to 16"),
    ],
)
def test_wrong_specs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FormattedDisk(**{"path": "/a", "format": "qcow2", **values})  # type: ignore[arg-type]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is neither a file nor a block device"):
        VirtioRig(FormattedDisk(path=tmp_path, format="raw").attach, memory_backing="memfd")
    with pytest.raises(HostError, match="No such file"):
        VirtioRig(FormattedDisk(path=tmp_path / "no", format="raw").attach, memory_backing="memfd")
