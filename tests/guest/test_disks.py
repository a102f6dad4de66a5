"""Disks under a stock kernel's virtio-blk driver."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Command

from kvmlite import Disk, Exited, GuestConfig, LinuxGuest
from kvmlite import run as kvmlite_run

MIB = 1 << 20


@pytest.fixture
def disk_directory() -> Iterator[Path]:
    """A directory on a disk: memory file systems have no direct I/O."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        yield Path(path)


def make_image(path: Path, size: int = 64 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(path)], check=True, capture_output=True)
    return path


def run(script: str, kernel: Path, disks: tuple[Disk, ...]) -> str:
    """What a shell script in a guest with these disks printed; none of its steps failed."""
    config = GuestConfig(kernel=kernel, devices=disks, features=("blk", "ext4"), vcpu_count=2)
    with LinuxGuest(config) as guest:
        guest.start()
        guest.wait_agent()
        handle = guest.exec(["sh", "-ec", script])
        report = guest.run_to_end(handle)
    assert report.outcome == Exited(code=0), handle.stderr
    return handle.stdout.decode()


def test_a_file_system_is_written_discarded_and_sound_afterwards(
    kernel: Path, disk_directory: Path, mappings: None
) -> None:
    image, shared, direct = (make_image(disk_directory / name) for name in ("disk.img", "shared.img", "direct.img"))
    disks = (
        Disk(path=str(image), serial="data", queues=2),
        Disk(path=str(shared), serial="readonly", read_only=True),
        Disk(path=str(direct), direct=True),
        Disk(path=str(shared), overlay="discard"),
    )
    script = """
        for disk in vda vdb; do cat /sys/block/$disk/serial; echo; done
        cat /sys/block/vda/size /sys/block/vdb/ro /sys/block/vda/queue/discard_max_bytes
        ls /sys/block/vda/mq | wc -l
        mkdir -p /a /b /c /d
        mount -t ext4 -o discard /dev/vda /a; mount -t ext4 -o ro /dev/vdb /b; mount -t ext4 /dev/vdc /c; mount -t ext4 /dev/vdd /d
        dd if=/dev/urandom of=/a/x bs=64k count=300 2>/dev/null; cp /a/x /c/x; cp /a/x /d/x; sync
        echo 3 > /proc/sys/vm/drop_caches
        cmp /a/x /c/x; cmp /a/x /d/x
        rm /a/x; sync; echo kept > /a/y
        ! dd if=/dev/zero of=/dev/vdb count=1 2>/dev/null
        umount /a /b /c /d
    """
    before = shared.read_bytes()
    lines = run(script, kernel, disks).split()
    assert lines[:2] == ["data", "readonly"]
    assert lines[2:5] == [str(64 * MIB // 512), "1", str(1 << 30)]
    assert shared.read_bytes() == before
    for path in (image, direct):
        subprocess.run(["e2fsck", "-fn", str(path)], check=True, capture_output=True)
    cat = subprocess.run(["debugfs", "-R", "cat y", str(image)], check=True, capture_output=True, text=True)
    assert cat.stdout == "kept\n"
    assert image.stat().st_blocks * 512 < 20 * MIB, "what was deleted takes space"


def test_the_command_and_the_library_take_disks(kvmlite: Command, kernel: Path, disk_directory: Path) -> None:
    image = make_image(disk_directory / "a,b.img", 8 * MIB)
    disk = f"{disk_directory}/a,,b.img,serial=cli,iops=1000"
    script = "cat /sys/block/vda/serial; echo -n written | dd of=/dev/vda conv=fsync seek=100 2>/dev/null"
    ended = kvmlite("run", "--kernel", kernel, "--disk", disk, "--", "sh", "-c", script, timeout_s=200)
    assert (ended.stdout, ended.code) == (b"cli", 0), ended
    assert image.read_bytes()[51200:51207] == b"written"
    found = kvmlite_run(
        "dd if=/dev/vda bs=512 skip=100 count=1", kernel=kernel, disks=[Disk(path=str(image), read_only=True)]
    )
    assert found.stdout.startswith("written")
