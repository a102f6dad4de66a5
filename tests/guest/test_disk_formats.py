"""Disks in the formats of other hypervisors under a stock kernel, and their server killed while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Command

import kvmlite
from kvmlite import Exited, FormattedDisk, GuestConfig, LinuxGuest
from kvmlite.devices import vhost_user
from kvmlite.devices.vhost_user import VhostUserDevice
from kvmlite.images.volumes import VolumeStore

PATIENCE_S = 150.0
READING = """
    for i in 1 2 3 4; do
        while [ ! -e /stop ]; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; done &
    done
    wait
"""
WRITING = """
    mkdir /b; mount -t ext4 /dev/vdb /b
    while dd if=/dev/zero of=/b/x bs=64k count=50 conv=fsync 2>/dev/null; do [ ! -e /stop ] || exit 0; done
    exit 1
"""
LAST = """
    dd if=/dev/vda of=/dev/null bs=1M iflag=direct 2>/dev/null
    ! dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null
"""

FORMATS = ("qcow2", "vmdk", "vdi", "vhdx")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory on a disk: memory file systems have no direct I/O."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a daemon that has closed the connection says at its end is waited for, however busy the host is."""
    monkeypatch.setattr(vhost_user, "_LAST_WORDS_S", PATIENCE_S)


def make_image(path: Path, format: str) -> Path:
    """An image with an ext4 file system and a file in it."""
    source, raw = path.with_name(f"{path.name}.tree"), path.with_name(f"{path.name}.raw")
    source.mkdir()
    (source / "file").write_text(f"in {format}\n")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(source), str(raw), "32M"], check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, str(raw), str(path)], check=True)
    raw.unlink()
    return path


def test_volumes_of_other_formats_are_mounted_where_they_are_asked_for(kernel: Path, directory: Path) -> None:
    """Disks that all have the same serial, beside one of another kind that comes first."""
    store = VolumeStore()
    for name, format in (("one", "qcow2"), ("two", "raw"), ("three", "vhdx")):
        store.create(name, 32 << 20, format=format, filesystem="ext4")
    disks = [FormattedDisk(path=make_image(directory / "disk.vdi", "vdi"), format="vdi")]
    volumes = {"three": "/3", "one": "/1", "two": "/2"}
    script = "for n in 1 2 3; do echo in $n > /$n/file; done; mount -t ext4 /dev/vda /4; cat /4/file"
    first = kvmlite.run(f"mkdir /4; {script}", kernel=kernel, volumes=volumes, disks=disks)
    assert (first.exit_code, first.stdout, first.stderr) == (0, "in vdi\n", "")
    for name, number in (("two", 2), ("three", 3), ("one", 1)):
        again = kvmlite.run("cat /x/file; ls /x", kernel=kernel, volumes={name: "/x"})
        assert (again.exit_code, again.stdout.split()[:3]) == (0, ["in", str(number), "file"])


def test_every_format_is_read_and_written_and_outlives_a_machine(kernel: Path, directory: Path, mappings: None) -> None:
    images = {format: make_image(directory / f"disk.{format}", format) for format in FORMATS}
    disks = tuple(FormattedDisk(path=path, format=format, direct=format == "vdi") for format, path in images.items())
    script = """
        for disk in vda vdb vdc vdd; do
            mkdir -p /$disk; mount -t ext4 /dev/$disk /$disk; cat /$disk/file
            dd if=/dev/urandom of=/$disk/new bs=64k count=40 2>/dev/null; cp /$disk/new /$disk/copy; sync
            echo 3 > /proc/sys/vm/drop_caches; cmp /$disk/new /$disk/copy; umount /$disk
        done
    """
    with LinuxGuest(GuestConfig(kernel=kernel, devices=disks, features=("blk", "ext4"))) as guest:
        guest.start()
        guest.wait_agent()
        handle = guest.exec(["sh", "-ec", script])
        report = guest.run_to_end(handle)
    assert report.outcome == Exited(code=0), handle.stderr
    assert handle.stdout.decode().splitlines() == [f"in {format}" for format in FORMATS]
    for format, path in images.items():
        subprocess.run(
            ["qemu-img", "convert", "-f", format, "-O", "raw", str(path), str(directory / "raw")], check=True
        )
        subprocess.run(["e2fsck", "-fn", str(directory / "raw")], check=True, capture_output=True)


def test_a_server_killed_under_load_is_replaced_or_its_disk_fails(
    kernel: Path, directory: Path, mappings: None
) -> None:
    lasting, written = make_image(directory / "a.vmdk", "vmdk"), make_image(directory / "b.qcow2", "qcow2")
    disks = (
        FormattedDisk(path=lasting, format="vmdk", read_only=True, direct=True),
        FormattedDisk(path=written, format="qcow2"),
    )
    with LinuxGuest(GuestConfig(kernel=kernel, devices=disks, features=("blk", "ext4"))) as guest:
        warnings: list[str] = []
        guest.machine.call_on_warning(warnings.append)
        guest.start()
        guest.wait_agent()
        loads = [guest.exec(["sh", "-c", script]) for script in (READING, WRITING)]
        for load in loads:
            load.wait_started(PATIENCE_S)
        assert guest.exec(["sh", "-c", "until [ -e /b/x ]; do sleep 0.1; done"]).wait(PATIENCE_S) == 0
        for device in guest.machine._parts.devices.values():
            if isinstance(device, VhostUserDevice):
                os.kill(device._back_end.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while len(warnings) < len(disks):
            assert time.monotonic() < deadline, warnings
            time.sleep(0.1)
        assert guest.exec(["touch", "/stop"]).wait(PATIENCE_S) == 0
        assert loads[0].wait(PATIENCE_S) == 0
        assert loads[1].wait(PATIENCE_S) != 0
        last = guest.exec(["sh", "-ec", LAST])
        report = guest.run_to_end(last)
    assert report.outcome == Exited(code=0), (last.stdout, last.stderr, warnings)
    assert len(warnings) == 2
    assert any("it was started again" in text for text in warnings)
    assert any("writes that it had not stored yet are lost with it" in text for text in warnings)
    assert subprocess.run(["qemu-img", "check", "-q", str(written)], check=False).returncode in (0, 3)  # leaks at worst


def test_from_the_command_line(kvmlite: Command, kernel: Path, directory: Path) -> None:
    image = make_image(directory / "disk.vhdx", "vhdx")
    disk = f"{image},format=vhdx,ro"
    ended = kvmlite("run", "--kernel", kernel, "--disk", disk, "--", "cat", "/sys/block/vda/ro", timeout_s=200)
    assert (ended.code, ended.stdout) == (0, b"1\n"), ended.stderr
    ended = kvmlite("run", "--kernel", kernel, "--disk", image, "--", "true", timeout_s=200)
    assert ended.code == 125
    assert "is not said to be vhdx" in ended.stderr
