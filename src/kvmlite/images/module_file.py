"""One kernel module file: unpacked, checked to be a whole x86-64 ELF object, and asked what it needs.

ELF64 fields used (offset, little-endian)::

    file header    0x10 u16 e_type (1 relocatable) / 0x12 u16 e_machine / 0x28 u64 e_shoff
                   0x3a u16 e_shentsize / 0x3c u16 e_shnum / 0x3e u16 e_shstrndx
    section header 0x00 u32 sh_name / 0x18 u64 sh_offset / 0x20 u64 sh_size

``.modinfo`` is a list of NUL-terminated ``key=value`` strings; padding between them is NULs too.
"""

from __future__ import annotations

import struct

from kvmlite.errors import ImageError, UnsupportedError

__all__ = ["MAX_MODULE_SIZE", "load_module", "module_name", "parse_modinfo"]

MAX_MODULE_SIZE = 256 << 20
"""Largest unpacked module accepted (bytes); a smaller file may still claim to unpack to anything."""

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_REMEDY = "install or add the kernel again (kvmlite kernel add)"


def module_name(path: str) -> str:
    """Return the kernel's name of a module file (``virtio-rng.ko.xz`` is ``virtio_rng``), or "" if it is none."""
    name = path.rpartition("/")[2]
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)].replace("-", "_")
    return ""


def load_module(path: str, *, release: str = "") -> bytes:
    """Read a module file, unpacked whatever it is packed with.

    The packing is told by its first bytes, not by the name. The result is a complete ELF object for x86-64.

    Args:
        path: The file, ``.ko`` or packed with xz, zstd or gzip.
        release: The kernel's release: a module built for another one is an error. Empty: not checked.

    Raises:
        ImageError: The file is missing, damaged, truncated, too large, no module, or of another kernel.
        UnsupportedError: It is packed with zstd and Python has no ``zstandard``.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(MAX_MODULE_SIZE + 1)
    except OSError as error:
        raise ImageError(f"cannot read module {path}: {error.strerror or error}", hint=_REMEDY) from error
    if len(packed) > MAX_MODULE_SIZE:
        raise ImageError(f"module {path} is larger than {MAX_MODULE_SIZE >> 20} MiB", hint=_REMEDY)
    if packed.startswith(b"\xfd7zXZ\0"):
        data = _unpack_xz(path, packed)
    elif packed.startswith(b"\x1f\x8b"):
        data = _unpack_gzip(path, packed)
    elif packed.startswith(b"\x28\xb5\x2f\xfd"):
        data = _unpack_zstd(path, packed)
    else:
        data = packed
    _check_object(path, data)
    if release:
        _check_release(path, data, release)
    return data


def _check_release(path: str, data: bytes, release: str) -> None:
    built_for = parse_modinfo(path, data).get("vermagic", ("",))[0].split(" ")[0]
    if built_for and built_for != release:
        raise ImageError(
            f"module {path} is built for kernel {built_for}, not for {release}",
            hint="give the modules that were built together with the kernel (--modules DIR)",
        )


def _damaged(path: str, how: str) -> ImageError:
    return ImageError(f"module {path} is damaged: {how}", hint=_REMEDY)


def _unpack_xz(path: str, packed: bytes) -> bytes:
    import lzma

    unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 << 20)
    try:
        data = unpacker.decompress(packed, max_length=MAX_MODULE_SIZE + 1)
    except lzma.LZMAError as error:
        raise _damaged(path, f"xz: {error}") from error
    return _whole(path, "xz", data, unpacker.eof)


def _unpack_gzip(path: str, packed: bytes) -> bytes:
    import zlib

    unpacker = zlib.decompressobj(wbits=31)
    try:
        data = unpacker.decompress(packed, MAX_MODULE_SIZE + 1)
    except zlib.error as error:
        raise _damaged(path, f"gzip: {error}") from error
    return _whole(path, "gzip", data, unpacker.eof)


def _unpack_zstd(path: str, packed: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedError(
            f"module {path} is packed with zstd, which this Python cannot unpack",
            hint="pip install zstandard, or unpack the modules with unzstd",
        ) from error
    unpacker = zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(packed)
    try:
        data = unpacker.read(MAX_MODULE_SIZE + 1)
        claimed = zstandard.get_frame_parameters(packed).content_size
    except zstandard.ZstdError as error:
        raise _damaged(path, f"zstd: {error}") from error
    known = claimed != zstandard.CONTENTSIZE_UNKNOWN
    return _whole(path, "zstd", data, not known or len(data) == claimed)


def _whole(path: str, packing: str, data: bytes, is_complete: bool) -> bytes:
    if len(data) > MAX_MODULE_SIZE:
        raise _damaged(path, f"{packing} data unpacks to more than {MAX_MODULE_SIZE >> 20} MiB")
    if not is_complete:
        raise _damaged(path, f"{packing} data ends early")
    return data


def _check_object(path: str, data: bytes) -> None:
    if data[:4] != b"\x7fELF":
        what = "the file is empty" if not data else f"not an ELF object (starts with {data[:4].hex(' ')})"
        raise _damaged(path, what)
    if len(data) < 64:
        raise _damaged(path, f"truncated after {len(data)} bytes")
    kind, machine = struct.unpack_from("<HH", data, 0x10)
    if data[4:6] != b"\x02\x01" or machine != 62 or kind != 1:
        raise _damaged(path, f"not an x86-64 relocatable object (ELF machine {machine}, type {kind})")
    offset, entry_size, count = _section_table(data)
    if entry_size != 64 or not offset or offset + entry_size * count > len(data):
        raise _damaged(path, f"truncated: section headers end at {offset + entry_size * count} of {len(data)} bytes")


def _section_table(data: bytes) -> tuple[int, int, int]:
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    return offset, entry_size, count


def parse_modinfo(path: str, data: bytes) -> dict[str, tuple[str, ...]]:
    """Return the ``.modinfo`` of a module from :func:`load_module`: each key with its values in order.

    Raises:
        ImageError: A section lies outside the file.
    """
    found: dict[str, tuple[str, ...]] = {}
    for entry in _section(path, data, b".modinfo").split(b"\0"):
        key, separator, value = entry.partition(b"=")
        if separator:
            name = key.decode("ascii", "replace")
            found[name] = (*found.get(name, ()), value.decode("utf-8", "replace"))
    return found


def _section(path: str, data: bytes, wanted: bytes) -> bytes:
    """Return the bytes of a section by name; empty if there is none."""
    offset, entry_size, count = _section_table(data)
    (strings_index,) = struct.unpack_from("<H", data, 0x3E)
    if strings_index >= count:
        raise _damaged(path, f"section name table {strings_index} of {count} sections")
    strings = _section_bytes(path, data, offset + strings_index * entry_size)
    for header in range(offset, offset + count * entry_size, entry_size):
        (name,) = struct.unpack_from("<I", data, header)
        if strings[name : name + len(wanted) + 1] == wanted + b"\0":
            return _section_bytes(path, data, header)
    return b""


def _section_bytes(path: str, data: bytes, header: int) -> bytes:
    start, size = struct.unpack_from("<QQ", data, header + 0x18)
    if start + size > len(data):
        raise _damaged(path, f"a section ends at {start + size} of {len(data)} bytes")
    return data[start : start + size]
