"""Where the partitions of a raw disk image are: GPT (UEFI specification 2.10, chapter 5.3) or MBR, 512-byte sectors.

MBR, at the end of the first sector: 0x1be four entries of 16 bytes / 0x1fe le16 0xaa55. An entry: 4 u8 type / 8 le32 first
sector / 12 le32 number of sectors.

GPT header, in the second sector: 0 "EFI PART" / 12 le32 size / 16 le32 CRC of the header, itself taken as 0 / 72 le64 first
sector of the table / 80 le32 entries / 84 le32 size of one / 88 le32 CRC of the table. An entry: 0 16 bytes type, all zeros
if unused / 32 le64 first sector / 40 le64 last sector.
"""

from __future__ import annotations

import os
import struct
import zlib

from kvmlite.errors import ImageError
from kvmlite.records import dataclass

__all__ = ["Partition", "read_partitions"]

_SECTOR = 512
_MBR_ENTRY = struct.Struct("<4xB3xII")
_GPT_HEADER = struct.Struct("<8sIIII48xQIII")  # up to the table's CRC, 92 bytes
_GPT_ENTRY = struct.Struct("<16s16xQQ")
_MAX_TABLE = 1 << 20
_MAX_LOGICAL = 64
_EXTENDED = (0x05, 0x0F, 0x85)
_GPT_PROTECTIVE = 0xEE
_EXT_MAGIC = (1024 + 0x38, b"\x53\xef")
# 4f68bce3-e8cd-4db1-96e7-fbcaf984b709, "root (x86-64)" of the Discoverable Partitions Specification, as it is on the disk
_ROOT_X86_64 = bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A partition, or a whole disk without a partition table.

    Attributes:
        number: As the kernel counts (``vda1`` is 1); 0 for the whole disk.
        offset, size: Bytes.
        is_ext: There is an ext2, ext3 or ext4 file system in it.
        is_root: Its type says that it is the root of an x86-64 system.
    """

    number: int
    offset: int
    size: int
    is_ext: bool
    is_root: bool


def read_partitions(path: str) -> tuple[Partition, ...]:
    """Return the partitions of a disk image by number, or the whole disk if it has a file system and no partitions.

    Raises:
        ImageError: The table is damaged or names space outside the image, or there is neither table nor ext file system.
        OSError: The file cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        if _has_ext(fd, 0):
            return (Partition(number=0, offset=0, size=size, is_ext=True, is_root=True),)
        sector = os.pread(fd, _SECTOR, 0)
        if len(sector) < _SECTOR or sector[510:] != b"\x55\xaa":
            raise ImageError(
                f"{path} has neither an ext file system nor a partition table",
                hint="a disk image must be raw: qemu-img convert -O raw makes it so",
            )
        entries = _mbr_entries(sector)
        if any(kind == _GPT_PROTECTIVE for kind, _, _ in entries):
            found = _read_gpt(fd, path)
        else:
            found = _read_mbr(fd, path, entries)
        return tuple([_partition(fd, path, size, number, *place) for number, place in sorted(found.items())])
    finally:
        os.close(fd)


def _partition(fd: int, path: str, disk_size: int, number: int, first: int, count: int, is_root: bool) -> Partition:
    offset, size = first * _SECTOR, count * _SECTOR
    if offset == 0 or size == 0 or offset + size > disk_size:
        raise ImageError(f"partition {number} of {path} at {offset:#x}, {size:#x} bytes, is not inside the image")
    return Partition(number=number, offset=offset, size=size, is_ext=_has_ext(fd, offset), is_root=is_root)


def _has_ext(fd: int, offset: int) -> bool:
    position, magic = _EXT_MAGIC
    return os.pread(fd, len(magic), offset + position) == magic


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int]]:
    """Type, first sector and number of sectors of the four entries."""
    return [_MBR_ENTRY.unpack_from(sector, 0x1BE + 16 * index) for index in range(4)]


def _read_mbr(fd: int, path: str, entries: list[tuple[int, int, int]]) -> dict[int, tuple[int, int, bool]]:
    found = {}
    for number, (kind, first, count) in enumerate(entries, start=1):
        if kind in _EXTENDED:
            found.update(_read_logical(fd, path, first))
        elif kind:
            found[number] = (first, count, False)
    return found


def _read_logical(fd: int, path: str, base: int) -> dict[int, tuple[int, int, bool]]:
    """Follow the chain of an extended partition: each link names a partition and the next link."""
    found, link = {}, base
    for number in range(5, 5 + _MAX_LOGICAL):
        sector = os.pread(fd, _SECTOR, link * _SECTOR)
        if len(sector) < _SECTOR or sector[510:] != b"\x55\xaa":
            raise ImageError(f"{path}: the extended partition's table at sector {link} is damaged")
        (kind, first, count), (_, following, _) = _mbr_entries(sector)[:2]
        if kind:
            found[number] = (link + first, count, False)
        if not following:
            return found
        link = base + following
    raise ImageError(f"{path}: more than {_MAX_LOGICAL} logical partitions, or their chain is a circle")


def _read_gpt(fd: int, path: str) -> dict[int, tuple[int, int, bool]]:
    sector = os.pread(fd, _SECTOR, _SECTOR)
    if len(sector) < _SECTOR:
        raise ImageError(f"{path}: the partition table (GPT) is cut off")
    magic, _, header_size, header_crc, _, table, count, entry_size, table_crc = _GPT_HEADER.unpack_from(sector)
    if magic != b"EFI PART" or not _GPT_HEADER.size <= header_size <= _SECTOR:
        raise ImageError(f"{path}: the partition table (GPT) is damaged")
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:header_size]) != header_crc:
        raise ImageError(f"{path}: the header of the partition table (GPT) has a wrong checksum")
    if entry_size < 128 or entry_size % 128 or not 0 < count * entry_size <= _MAX_TABLE:
        raise ImageError(f"{path}: a partition table (GPT) of {count} entries of {entry_size} bytes")
    data = os.pread(fd, count * entry_size, table * _SECTOR)
    if len(data) < count * entry_size or zlib.crc32(data) != table_crc:
        raise ImageError(f"{path}: the partition table (GPT) has a wrong checksum")
    found = {}
    for index in range(count):
        kind, first, last = _GPT_ENTRY.unpack_from(data, index * entry_size)
        if any(kind):
            found[index + 1] = (first, max(0, last - first + 1), kind == _ROOT_X86_64)
    return found
