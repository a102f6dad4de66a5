from __future__ import annotations

import bz2
import lzma
import struct
import subprocess
import zlib

import pytest
import zstandard

from kvmlite.boot import decompress
from kvmlite.boot.decompress import unpack_payload
from kvmlite.errors import ImageError, UnsupportedError

# Compresses well, and has matches near and far.
KERNEL = b"\x7fELF" + b"".join(i.to_bytes(3, "little") * (1 + i % 40) for i in range(3000)) + bytes(20000)


def with_size(compressed: bytes, size: int = len(KERNEL)) -> memoryview:
    return memoryview(compressed + struct.pack("<I", size))


def gzipped() -> bytes:
    stream = zlib.compressobj(wbits=31)
    return stream.compress(KERNEL) + stream.flush()


def program(name: str, *arguments: str) -> bytes:
    done = subprocess.run([name, *arguments], input=KERNEL, capture_output=True, check=True, timeout=30)
    return done.stdout


def lz4_block(*sequences: bytes) -> bytes:
    block = b"".join(sequences)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def test_gzip_payload_carries_its_size_itself():
    assert unpack_payload(memoryview(gzipped()), "k") == KERNEL


def test_xz_payload_with_the_x86_filter():
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
    data = lzma.compress(KERNEL, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)
    assert unpack_payload(with_size(data), "k") == KERNEL


def test_lzma_payload():
    assert unpack_payload(with_size(lzma.compress(KERNEL, lzma.FORMAT_ALONE)), "k") == KERNEL


def test_bzip2_payload():
    assert unpack_payload(with_size(bz2.compress(KERNEL)), "k") == KERNEL


@pytest.mark.compressors
def test_zstd_payload_with_a_wide_window():
    assert unpack_payload(with_size(program("zstd", "-3", "--long=27", "-c")), "k") == KERNEL


@pytest.mark.compressors
def test_lz4_payload():
    assert unpack_payload(with_size(program("lz4", "-l", "-9", "-c")), "k") == KERNEL


@pytest.mark.compressors
def test_lz4_payload_of_several_blocks(monkeypatch):
    compressed = program("lz4", "-l", "-1", "-c")
    assert unpack_payload(with_size(compressed + compressed[4:], 2 * len(KERNEL)), "k") == KERNEL * 2
    assert unpack_payload(with_size(compressed + compressed, 2 * len(KERNEL)), "k") == KERNEL * 2


def test_uncompressed_payload_is_taken_as_it_is():
    assert unpack_payload(with_size(KERNEL), "k") == KERNEL
    assert unpack_payload(memoryview(KERNEL), "k") == KERNEL  # before the size was appended


def test_lz4_sequences():
    # "abcd", match of 4+2 at distance 4; then the literals "xyz" end the block; padded by a run from distance 1.
    block = lz4_block(b"\x42abcd\x04\x00", b"\x1f-\x01\x00\xff\x0a", b"\x30xyz")
    expected = b"abcdabcdab" + b"-" + b"-" * (4 + 15 + 255 + 10) + b"xyz"
    assert unpack_payload(with_size(block, len(expected)), "k") == expected


DAMAGED_LZ4 = [
    ("empty block", lz4_block(b""), "is damaged"),
    ("literals beyond the block", lz4_block(b"\x50abcd"), "is damaged"),
    ("length never ends", lz4_block(b"\xf0\xff\xff\xff"), "is damaged"),
    ("match length never ends", lz4_block(b"\x4fabcd\x01\x00\xff\xff"), "is damaged"),
    ("no distance", lz4_block(b"\x42abcd\x04"), "is damaged"),
    ("distance 0", lz4_block(b"\x42abcd\x00\x00\x10x"), "is damaged"),
    ("distance before the start", lz4_block(b"\x42abcd\x05\x00\x10x"), "is damaged"),
    ("ends after a match", lz4_block(b"\x42abcd\x04\x00"), "is damaged"),
    ("literals beyond the size", lz4_block(b"\xf0\x40" + b"x" * 79), "holds more than 64 bytes"),
    ("match beyond the size", lz4_block(b"\x4fabcd\x01\x00\x7f\x10x"), "holds more than 64 bytes"),
    (
        "block beyond the payload",
        b"\x02\x21\x4c\x18\xff\xff\xff\xff\x00",
        "lz4 block of 4294967295 bytes",
    ),
    ("too short", lz4_block(b"\x40abcd"), "unpacks to 4 bytes, announces 64"),
]


@pytest.mark.parametrize(("name", "data", "message"), DAMAGED_LZ4, ids=[d[0] for d in DAMAGED_LZ4])
def test_damaged_lz4_is_refused(name, data, message):
    with pytest.raises(ImageError, match=message):
        unpack_payload(with_size(data, 64), "k")


def test_lz4_that_announces_more_than_it_can_hold_is_refused_before_memory_is_taken():
    with pytest.raises(ImageError, match="more than LZ4 can hold"):
        unpack_payload(with_size(lz4_block(b"\x40abcd"), 400 << 20), "k")


def compressed_by(name: str) -> bytes:
    if name == "zstd":
        return zstandard.ZstdCompressor().compress(KERNEL)
    return {"xz": lzma.compress, "bzip2": bz2.compress}.get(name, lambda data: lzma.compress(data, lzma.FORMAT_ALONE))(
        KERNEL
    )


@pytest.mark.parametrize("name", ["xz", "bzip2", "lzma", "zstd"])
class TestEveryCodec:
    def test_refuses_data_that_ends_early(self, name):
        data = compressed_by(name)
        with pytest.raises(ImageError, match=r"damaged kernel payload: (ends early|unpacks to)"):
            unpack_payload(with_size(data[: len(data) // 2]), "k")

    def test_refuses_more_than_announced(self, name):
        with pytest.raises(ImageError, match="unpacks to 101 bytes, announces 100"):
            unpack_payload(with_size(compressed_by(name), 100), "k")

    def test_refuses_less_than_announced(self, name):
        with pytest.raises(ImageError, match="damaged kernel payload"):
            unpack_payload(with_size(compressed_by(name), len(KERNEL) + 1), "k")

    def test_refuses_damage(self, name):
        data = bytearray(compressed_by(name))
        for at in range(14, len(data), 7):
            data[at] ^= 0xA5
        with pytest.raises(ImageError, match="damaged kernel payload"):
            unpack_payload(with_size(bytes(data)), "k")


def test_damaged_gzip_is_refused():
    data = bytearray(gzipped())
    data[100] ^= 0xFF
    with pytest.raises(ImageError, match="damaged kernel payload"):
        unpack_payload(memoryview(bytes(data)), "k")


def test_gzip_that_ends_early_is_refused():
    with pytest.raises(ImageError, match="damaged kernel payload"):
        unpack_payload(with_size(gzipped()[:500], 1000), "k")


@pytest.mark.parametrize("size", [0, 63, (512 << 20) + 1, 2**32 - 1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ImageError, match=f"payload announces {size} bytes, allowed 64..536870912"):
        unpack_payload(with_size(bz2.compress(KERNEL), size), "k")


def test_lzo_is_named():
    with pytest.raises(UnsupportedError, match="compression is LZO") as refused:
        unpack_payload(with_size(b"\x89LZO\0\r\n\x1a\n" + bytes(50)), "k")
    assert "without unpacking" in refused.value.hint
    assert not decompress.is_known(b"\x89LZO\0\r\n\x1a\n")


def test_missing_zstandard_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(UnsupportedError, match="package zstandard is missing") as refused:
        unpack_payload(with_size(b"\x28\xb5\x2f\xfd" + bytes(50)), "k")
    assert "pip install zstandard" in refused.value.hint
