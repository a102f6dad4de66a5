from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from support.partitioned import FIRST, LINUX, ROOT_X86_64, SECTOR, gpt_disk, mbr

from kvmlite.errors import ImageError
from kvmlite.images.partitions import Partition, read_partitions

EXT = bytes(1024 + 0x38) + b"\x53\xef"


@pytest.fixture
def ext(tmp_path: Path) -> Path:
    """Something that begins like an ext file system, 64 KiB."""
    path = tmp_path / "ext"
    path.write_bytes(EXT.ljust(64 << 10, b"\0"))
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other"
    path.write_bytes(bytes(8 << 10))
    return path


def test_a_whole_disk_is_partition_0(ext: Path) -> None:
    assert read_partitions(str(ext)) == (Partition(number=0, offset=0, size=64 << 10, is_ext=True, is_root=True),)


def test_a_gpt_is_read(tmp_path: Path, ext: Path, other: Path) -> None:
    disk = gpt_disk(tmp_path / "disk", [(LINUX, other), (bytes(16), other), (ROOT_X86_64, ext)])
    assert read_partitions(str(disk)) == (
        Partition(number=1, offset=FIRST * SECTOR, size=8 << 10, is_ext=False, is_root=False),
        Partition(number=3, offset=3 * FIRST * SECTOR, size=64 << 10, is_ext=True, is_root=True),
    )


def test_an_mbr_with_logical_partitions_is_read(tmp_path: Path) -> None:
    disk = bytearray(400 * SECTOR)
    disk[:SECTOR] = mbr([(0x83, 10, 20), (0, 0, 0), (0x0F, 100, 300)])
    disk[100 * SECTOR : 101 * SECTOR] = mbr([(0x83, 10, 40), (0x05, 100, 100)])
    disk[200 * SECTOR : 201 * SECTOR] = mbr([(0x83, 5, 50)])
    disk[205 * SECTOR : 205 * SECTOR + len(EXT)] = EXT
    (tmp_path / "disk").write_bytes(disk)
    found = read_partitions(str(tmp_path / "disk"))
    places = [(part.number, part.offset // SECTOR, part.size // SECTOR, part.is_ext) for part in found]
    assert places == [(1, 10, 20, False), (5, 110, 40, False), (6, 205, 50, True)]


def patched(disk: Path, offset: int, data: bytes) -> Path:
    content = bytearray(disk.read_bytes())
    content[offset : offset + len(data)] = data
    disk.write_bytes(content)
    return disk


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (SECTOR, b"EFI PARX", "is damaged"),
        (SECTOR + 12, struct.pack("<I", 91), "is damaged"),
        (SECTOR + 12, struct.pack("<I", 513), "is damaged"),
        (SECTOR + 40, b"\x01", "header .* wrong checksum"),
        (2 * SECTOR + 32, b"\x01", "wrong checksum"),
        (510, b"\0\0", "neither an ext file system nor a partition table"),
    ],
)
def test_a_damaged_gpt_is_refused(tmp_path: Path, ext: Path, offset: int, data: bytes, message: str) -> None:
    disk = patched(gpt_disk(tmp_path / "disk", [(LINUX, ext)]), offset, data)
    with pytest.raises(ImageError, match=message):
        read_partitions(str(disk))


@pytest.mark.parametrize(
    "sector",
    [
        mbr([(0x83, 1000, 20)]),
        mbr([(0x83, 0, 20)]),
        mbr([(0x83, 10, 0)]),
        mbr([(0x83, 0xFFFFFFFF, 0xFFFFFFFF)]),
        mbr([(0x05, 0xFFFFFFFF, 20)]),
        mbr([(0x05, 0, 20)]),
    ],
)
def test_partitions_outside_the_disk_are_refused(tmp_path: Path, sector: bytes) -> None:
    (tmp_path / "disk").write_bytes(sector + bytes(99 * SECTOR))
    with pytest.raises(ImageError):
        read_partitions(str(tmp_path / "disk"))


def test_a_circle_of_logical_partitions_ends(tmp_path: Path) -> None:
    disk = bytearray(100 * SECTOR)
    disk[:SECTOR] = mbr([(0x05, 10, 80)])
    disk[10 * SECTOR : 11 * SECTOR] = mbr([(0x83, 1, 1), (0x05, 5, 5)])
    disk[15 * SECTOR : 16 * SECTOR] = mbr([(0x83, 1, 1), (0x05, 5, 5)])
    (tmp_path / "disk").write_bytes(disk)
    with pytest.raises(ImageError, match="their chain is a circle"):
        read_partitions(str(tmp_path / "disk"))


def test_random_tables_are_read_or_refused(tmp_path: Path, ext: Path) -> None:
    disk = gpt_disk(tmp_path / "disk", [(LINUX, ext)])
    size, whole = disk.stat().st_size, disk.read_bytes()[: 34 * SECTOR]
    generator = random.Random(1)
    for _ in range(100):
        head = bytearray(whole)
        for _ in range(generator.randrange(1, 6)):
            head[generator.choice((0x1BE, SECTOR, 2 * SECTOR)) + generator.randrange(64)] = generator.randrange(256)
        with disk.open("r+b") as file:
            file.write(head)
        try:
            found = read_partitions(str(disk))
        except ImageError:
            continue
        assert all(part.offset >= 0 and part.offset + part.size <= size for part in found)
