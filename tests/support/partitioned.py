"""Disk images with a partition table, written by hand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

SECTOR = 512
LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
ROOT_X86_64 = bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709")
FIRST = 2048


def gpt_disk(path: Path, partitions: list[tuple[bytes, Path]]) -> Path:
    """Write a disk with these partitions, (type, file) each, each at a MiB; numbers 1, 2 ..."""
    entries, position = b"", FIRST
    places = []
    for kind, source in partitions:
        count = -(-source.stat().st_size // SECTOR)
        places.append((position, source))
        entries += kind + bytes(16) + struct.pack("<QQ", position, position + count - 1) + bytes(80)
        position = -(-(position + count) // FIRST) * FIRST
    entries = entries.ljust(128 * 128, b"\0")
    with path.open("wb") as disk:
        for place, source in places:
            disk.seek(place * SECTOR)
            _copy_data(source, disk)
        disk.truncate((position + FIRST) * SECTOR)
        last = position + FIRST - 1
        disk.seek(0)
        disk.write(mbr([(0xEE, 1, last)]))
        disk.write(gpt_header(entries, last))
        disk.write(entries)
    return path


def gpt_header(entries: bytes, last: int, size: int = 92) -> bytes:
    """The sector of a GPT header for 128 entries in sectors 2 to 33."""

    def header(crc: int) -> bytes:
        fixed = struct.pack("<8sIIIIQQQQ16s", b"EFI PART", 0x10000, size, crc, 0, 1, last, 34, last - 33, bytes(16))
        return fixed + struct.pack("<QIII", 2, 128, 128, zlib.crc32(entries))

    return header(zlib.crc32(header(0))).ljust(SECTOR, b"\0")


def mbr(entries: list[tuple[int, int, int]]) -> bytes:
    """A sector with a partition table: (type, first sector, number of sectors) each."""
    table = b"".join(struct.pack("<4xB3xII", *entry) for entry in entries).ljust(64, b"\0")
    return bytes(0x1BE) + table + b"\x55\xaa"


def _copy_data(source: Path, disk: object) -> None:
    """Copy what is not a hole; the file is thin."""
    start = disk.tell()  # type: ignore[attr-defined]
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                disk.seek(start + file.tell() - len(block))  # type: ignore[attr-defined]
                disk.write(block)  # type: ignore[attr-defined]
