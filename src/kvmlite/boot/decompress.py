"""Decompressors for kernel payloads, each bounded by the size the image announces.

Off the start path: imported when a bzImage is unpacked, and each codec when its magic is seen.
"""

from __future__ import annotations

from kvmlite.abi.elf import ELFMAG
from kvmlite.errors import ImageError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Decompressor(Protocol):
        """What the ones of the standard library have in common."""

        @property
        def eof(self) -> bool: ...
        def decompress(self, data: bytes, max_length: int, /) -> bytes: ...

    Codec = Callable[[memoryview, int, str], bytearray]


MAX_SIZE = 512 << 20
"""Largest kernel that is unpacked, in bytes; the largest distribution kernels have 70 MB."""

_STEP = 4 << 20
_LZ4_BLOCK = 8 << 20  # legacy frames: every block but the last unpacks to this
_LZ4_LEGACY = b"\x02\x21\x4c\x18"


def unpack_payload(payload: memoryview, path: str) -> bytes | bytearray | memoryview:
    """Unpack the payload of a bzImage: compressed data and, in its last 4 bytes, the size of the result.

    Args:
        payload: payload_offset to payload_offset + payload_length of the file.
        path: The kernel's name, for messages.

    Returns:
        The vmlinux, exactly of the size announced (one that is not compressed: as it is).

    Raises:
        ImageError: damaged data, or not of the size announced.
        UnsupportedError: a compression kvmlite has no decoder for; the guest itself can unpack it.
    """
    head = bytes(payload[:9])
    size = int.from_bytes(payload[-4:], "little")
    if head.startswith(ELFMAG):
        return payload[:-4] if size == len(payload) - 4 else payload
    codec = _codec(head)
    if codec is None:
        name = "LZO" if head == b"\x89LZO\0\r\n\x1a\n" else f"unknown ({head[:6].hex(' ')})"
        raise UnsupportedError(
            f"{path}: the kernel's compression is {name}",
            hint="boot it without unpacking: the kernel unpacks itself",
        )
    if not 64 <= size <= MAX_SIZE:
        raise ImageError(f"{path}: payload announces {size} bytes, allowed 64..{MAX_SIZE}")
    # The size is the end of a gzip stream, and comes after the stream with the others.
    data = payload if codec is _gzip else payload[:-4]
    result = codec(data, size, path)
    if len(result) != size:
        raise _damaged(path, f"unpacks to {len(result)} bytes, announces {size}")
    return result


def is_known(head: bytes) -> bool:
    """Whether a payload that starts with these bytes (at least 6) is of a kind ``unpack_payload`` knows."""
    return head.startswith(ELFMAG) or _codec(head) is not None


def _codec(head: bytes) -> Codec | None:
    return next((codec for magic, codec in _CODECS if head.startswith(magic)), None)


def _damaged(path: str, detail: str) -> ImageError:
    return ImageError(f"{path}: damaged kernel payload: {detail}", hint="copy or download the kernel again")


def _drain(decompressor: Decompressor, data: memoryview, size: int, path: str) -> bytearray:
    """Run a decompressor to the end of its stream, at most one byte further than ``size``."""
    result = bytearray()
    fed = 0
    chunk = bytes(data[:_STEP])
    while not decompressor.eof and len(result) <= size:
        out = decompressor.decompress(chunk, size + 1 - len(result))
        result += out
        fed += len(chunk)
        if decompressor.eof or len(result) > size:
            break
        chunk = bytes(data[fed : fed + _STEP])
        if not chunk and not out:
            raise _damaged(path, f"ends early, after {len(result)} of {size} bytes")
    return result


def _gzip(data: memoryview, size: int, path: str) -> bytearray:
    import zlib

    stream = zlib.decompressobj(wbits=31)
    result = bytearray()
    pending: bytes | memoryview = data
    try:
        while not stream.eof and len(result) <= size:
            out = stream.decompress(pending, size + 1 - len(result))
            result += out
            pending = stream.unconsumed_tail
            if not pending and not stream.eof:
                raise _damaged(path, f"ends early, after {len(result)} of {size} bytes")
    except zlib.error as error:
        raise _damaged(path, f"gzip: {error}") from error
    return result


def _xz(data: memoryview, size: int, path: str) -> bytearray:
    import lzma

    return _lzma_stream(data, size, path, lzma.FORMAT_XZ, "xz")


def _lzma_alone(data: memoryview, size: int, path: str) -> bytearray:
    import lzma

    return _lzma_stream(data, size, path, lzma.FORMAT_ALONE, "lzma")


def _lzma_stream(data: memoryview, size: int, path: str, form: int, name: str) -> bytearray:
    import lzma

    try:
        # The dictionary is allocated as the header asks: bound it, it is a stranger's number.
        return _drain(lzma.LZMADecompressor(form, memlimit=256 << 20), data, size, path)
    except lzma.LZMAError as error:
        raise _damaged(path, f"{name}: {error}") from error


def _bzip2(data: memoryview, size: int, path: str) -> bytearray:
    import bz2

    try:
        return _drain(bz2.BZ2Decompressor(), data, size, path)
    except OSError as error:
        raise _damaged(path, f"bzip2: {error}") from error


def _zstd(data: memoryview, size: int, path: str) -> bytearray:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: the kernel's compression is zstd, and the Python package zstandard is missing",
            hint="pip install zstandard (Debian: python3-zstandard), or boot it without unpacking",
        ) from error
    result = bytearray()
    try:
        # Kernels use a window of up to 128 MiB (zstd -22 --ultra).
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
        while len(result) <= size:
            out = reader.read(min(_STEP, size + 1 - len(result)))
            if not out:
                break
            result += out
    except zstandard.ZstdError as error:
        raise _damaged(path, f"zstd: {error}") from error
    return result


def _lz4(data: memoryview, size: int, path: str) -> bytearray:
    from kvmlite._native import ffi, lib

    if size > len(data) * 255:
        raise _damaged(path, f"announces {size} bytes from {len(data)}, more than LZ4 can hold")
    result = bytearray(size)
    source = ffi.from_buffer("uint8_t[]", data)
    target = ffi.from_buffer("uint8_t[]", result, require_writable=True)
    at, made = len(_LZ4_LEGACY), 0
    while at + 4 <= len(data):
        block = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if block == int.from_bytes(_LZ4_LEGACY, "little"):  # another frame: lz4 output concatenated
            continue
        if block > len(data) - at:
            raise _damaged(path, f"lz4 block of {block} bytes with {len(data) - at} left")
        room = min(size - made, _LZ4_BLOCK)
        written = lib.kvl_lz4_decode_block(source + at, block, target + made, room)
        if written < 0:
            why = "is damaged" if written == -1 else f"holds more than {room} bytes"
            raise _damaged(path, f"lz4 block at {at} {why}")
        at += block
        made += written
    del source, target
    return result[:made] if made != size else result


_CODECS: tuple[tuple[bytes, Codec], ...] = (
    (b"\x1f\x8b\x08", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (_LZ4_LEGACY, _lz4),
    (b"BZh", _bzip2),
    (b"\x5d\0\0", _lzma_alone),
)
