"""The vmlinux inside a bzImage, unpacked once on the host and kept: the guest never decompresses.

The cache holds one file per bzImage, named by its SHA-256. It may be lost, full, shared by many processes or
damaged: then the kernel is unpacked again, and at worst into memory only.
"""

from __future__ import annotations

import os
import stat

from kvmlite.abi.elf import ELFMAG
from kvmlite.boot.elf import ElfKernel, parse_elf
from kvmlite.errors import ImageError, KvmliteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmlite.boot.bzimage import BzImage
    from kvmlite.boot.image import KernelImage

    Content = bytes | bytearray | memoryview

KEEP = 16
"""Unpacked kernels kept; the ones longest unused go first (about 60 MB each)."""

_TEMPORARY = ".new-"
_ALIAS = "stat-"
_ALIAS_AGE_S = 2.0
_STALE_S = 3600.0


class Vmlinux:
    """An unpacked kernel: an open file (cached, or a memfd) and its headers. Owns ``fd``; a context manager."""

    __slots__ = ("elf", "fd", "is_cached", "path")

    def __init__(self, path: str, fd: int, elf: ElfKernel, *, is_cached: bool) -> None:
        self.path = path
        self.fd = fd
        self.elf = elf
        self.is_cached = is_cached

    def close(self) -> None:
        """Close the file; again is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Vmlinux:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def can_unpack(image: KernelImage) -> bool:
    """Whether this is a bzImage that says where its payload is, of a compression kvmlite knows."""
    from kvmlite.boot.decompress import is_known

    bzimage = image.bzimage
    if bzimage is None or not bzimage.payload_size:
        return False
    return is_known(os.pread(image.fd, 16, bzimage.payload_offset))


def unpack(image: KernelImage, cache_dir: str | os.PathLike[str] | None) -> Vmlinux:
    """Get the vmlinux of a bzImage: from the cache, else unpacked and put there.

    Args:
        image: A bzImage with a payload.
        cache_dir: Where unpacked kernels are kept (made if it is not there); None keeps nothing.

    Returns:
        The unpacked kernel; the caller closes it.

    Raises:
        ImageError: the payload is damaged or holds no kernel.
        UnsupportedError: kvmlite has no decompressor for it.
    """
    if cache_dir is None:
        return _unpack_to_memory(image, _unpacked(image, _read_whole(image)))
    status = os.fstat(image.fd)
    is_settled = _is_settled(status)
    bzimage = _bzimage(image)
    trailer = os.pread(image.fd, 4, bzimage.payload_offset + bzimage.payload_size - 4)
    size = int.from_bytes(trailer, "little")
    directory = os.fspath(cache_dir)
    alias = os.path.join(directory, _alias_name(status))
    found = _from_cache(_read_alias(alias), size, image.path)
    if found is not None:
        return found
    import hashlib

    whole = _read_whole(image)
    entry = os.path.join(directory, hashlib.sha256(whole).hexdigest())
    found = _from_cache(entry, size, image.path)
    if found is None:
        data = _unpacked(image, whole)
        try:
            _store(entry, data)
        except OSError:  # a full disk or a read-only home must not keep a kernel from booting
            return _unpack_to_memory(image, data)
        found = _from_cache(entry, len(data), image.path)
        if found is None:  # pruned by another process, or a directory of strange owner
            return _unpack_to_memory(image, data)
    if is_settled:
        _write_alias(alias, entry)
    return found


def _bzimage(image: KernelImage) -> BzImage:
    if image.bzimage is None or not image.bzimage.payload_size:
        raise ImageError(f"{image.path}: is no bzImage with a payload: nothing to unpack")
    return image.bzimage


def _read_whole(image: KernelImage) -> bytes:
    """The file's bytes: read, not mapped, because touching a mapping of a file that shrinks ends the process."""
    chunks = []
    done = 0
    try:
        while done < image.size:
            chunk = os.pread(image.fd, image.size - done, done)
            if not chunk:
                raise ImageError(f"{image.path}: became shorter while it was read: {done} of {image.size} bytes")
            chunks.append(chunk)
            done += len(chunk)
    except OSError as error:
        if isinstance(error, KvmliteError):
            raise
        raise ImageError(f"{image.path}: cannot read the kernel: {error.strerror}") from error
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _unpacked(image: KernelImage, whole: bytes) -> Content:
    from kvmlite.boot.decompress import unpack_payload

    bzimage = _bzimage(image)
    start, end = bzimage.payload_offset, bzimage.payload_offset + bzimage.payload_size
    data = unpack_payload(memoryview(whole)[start:end], image.path)
    if bytes(data[:4]) != ELFMAG:
        raise ImageError(
            f"{image.path}: its payload unpacks to something that is no ELF (starts with {bytes(data[:4]).hex(' ')})",
            hint="boot it without unpacking, or copy the kernel again",
        )
    return data


def _unpack_to_memory(image: KernelImage, data: Content) -> Vmlinux:
    fd = os.memfd_create("kvmlite-vmlinux", os.MFD_CLOEXEC)
    try:
        _write_all(fd, data)
        return Vmlinux(image.path, fd, _headers(fd, len(data), image.path), is_cached=False)
    except BaseException:
        os.close(fd)
        raise


def _headers(fd: int, size: int, path: str) -> ElfKernel:
    return parse_elf(fd, size, f"{path} (unpacked)", os.pread(fd, 4096, 0))


def _from_cache(entry: str | None, size: int, path: str) -> Vmlinux | None:
    """The cached file if it is whole, ours and an ELF; None otherwise."""
    if entry is None:
        return None
    try:
        fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid())
        if not is_ours or status.st_mode & 0o022 or status.st_size != size:
            os.close(fd)
            return None
        found = Vmlinux(path, fd, _headers(fd, size, path), is_cached=True)
    except (OSError, KvmliteError):
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    _mark_used(entry)
    return found


# An alias is a symbolic link from what stat() says of a bzImage to its cached vmlinux, so that a start need not read
# and hash the whole file (50 ms where the CPU has no SHA instructions). Every write to a file changes its ctime.


def _alias_name(status: os.stat_result) -> str:
    return (
        f"{_ALIAS}{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
    )


def _read_alias(alias: str) -> str | None:
    """Path of the entry an alias names; None if there is none or it names something else."""
    try:
        target = os.readlink(alias)
    except OSError:
        return None
    is_entry = len(target) == 64 and all(digit in "0123456789abcdef" for digit in target)
    return os.path.join(os.path.dirname(alias), target) if is_entry else None


def _is_settled(status: os.stat_result) -> bool:
    """Whether a file is old enough that a further write would show in its ctime, whatever the clock's grain."""
    import time

    return time.time() - status.st_ctime > _ALIAS_AGE_S


def _write_alias(alias: str, entry: str) -> None:
    try:
        if os.path.islink(alias):
            os.unlink(alias)
        os.symlink(os.path.basename(entry), alias)
    except OSError:  # another process was faster, or the cache is read-only: the digest serves as well
        return


def _mark_used(entry: str) -> None:
    try:
        os.utime(entry)
    except OSError:  # a cache shared read-only serves as well; only the order of pruning suffers
        return


def _store(entry: str, data: Content) -> None:
    """Write the file beside its place and move it there whole: readers and other writers see all or nothing."""
    directory = os.path.dirname(entry)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    _prune(directory)
    temporary = f"{directory}/{_TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write_all(fd, data)
            os.fdatasync(fd)  # the name must not reach the disk before the content
        finally:
            os.close(fd)
        os.rename(temporary, entry)
    except BaseException:
        os.unlink(temporary)
        raise


def _prune(directory: str) -> None:
    """Make room for one more: drop what was unused longest, and what a killed writer left an hour ago."""
    entries = sorted(_entries(directory), reverse=True)
    newest = entries[0][0] if entries else 0.0
    kernels = [name for _, name in entries if not name.startswith((_TEMPORARY, _ALIAS))]
    dropped = kernels[KEEP - 1 :]
    dropped += [name for used, name in entries if name.startswith(_TEMPORARY) and used < newest - _STALE_S]
    kept = frozenset(kernels[: KEEP - 1])
    for _, name in entries:
        if name.startswith(_ALIAS) and os.path.basename(_read_alias(f"{directory}/{name}") or "") not in kept:
            dropped.append(name)
    for name in dropped:
        try:
            os.unlink(f"{directory}/{name}")
        except FileNotFoundError:  # another process prunes too
            continue


def _entries(directory: str) -> Iterator[tuple[float, str]]:
    with os.scandir(directory) as listing:
        for item in listing:
            try:
                yield item.stat(follow_symlinks=False).st_mtime, item.name
            except FileNotFoundError:
                continue


def _write_all(fd: int, data: Content) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[: 16 << 20]) :]
