"""A kernel and what belongs to it; and which release a kernel file is, read from the file itself.

A bzImage says so in its setup header (Linux boot protocol, kernel_version: le16 at 0x20e, the offset of a string minus
0x200); a vmlinux in its banner, ``Linux version RELEASE (...``.
"""

from __future__ import annotations

import os
import struct

from kvmlite.records import dataclass

__all__ = ["Kernel", "KernelFile", "identify"]

_BANNER = b"Linux version "
_KERNEL_VERSION = 0x20E
_SETUP_START = 0x200


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel that can be booted, and what belongs to it. Paths are on the host.

    Attributes:
        path: The bzImage or vmlinux.
        release: What ``uname -r`` says in the guest; empty if the file does not tell.
        modules_dir: Directory with ``modules.order`` or ``modules.dep`` of this release, or None.
        config: The kernel's ``.config``, or None.
        name: What messages call it.
        digest: SHA-256 of the image in hexadecimal if it lies in the store, else empty.
        source: Where it came from (``deb:PACKAGE=VERSION``, ``file:PATH`` ...).
        spec: What was asked for when it was added, such as a metapackage.
        names: All its names in the store.
        added: When it was added, ISO 8601 in UTC; empty outside the store.
    """

    path: str
    release: str
    modules_dir: str | None = None
    config: str | None = None
    name: str
    digest: str = ""
    source: str = ""
    spec: str = ""
    names: tuple[str, ...] = ()
    added: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFile:
    """What a kernel's own bytes say: ``is_bzimage``, and ``release``, which may be empty."""

    is_bzimage: bool
    release: str


def identify(path: str) -> KernelFile:
    """Tell a kernel file's kind and release.

    Raises:
        ImageError: It is no kernel for x86-64 (a directory, text, truncated ...); the text says what it is.
    """
    from kvmlite.boot import open_kernel

    with open_kernel(path) as image:
        if image.bzimage is not None:
            return KernelFile(is_bzimage=True, release=_bzimage_release(image.fd))
        return KernelFile(is_bzimage=False, release=_banner_release(image.fd, image.size))


def _bzimage_release(fd: int) -> str:
    (offset,) = struct.unpack("<H", os.pread(fd, 2, _KERNEL_VERSION))
    return _release(os.pread(fd, 256, offset + _SETUP_START)) if offset else ""


def _banner_release(fd: int, size: int) -> str:
    """Find ``Linux version <release> `` in a vmlinux; empty if there is none (a kernel that is not Linux)."""
    import mmap

    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
        found = view.find(_BANNER)
        while found >= 0:
            text = view[found + len(_BANNER) : found + len(_BANNER) + 256]
            if text[:1].isdigit():
                return _release(text)
            found = view.find(_BANNER, found + 1)
    return ""


def _release(text: bytes) -> str:
    """Return the first word of a kernel banner if it can be a directory name, else nothing."""
    word = text.split(b"\0", 1)[0].split(b" ", 1)[0]
    if word in (b"", b".", b"..") or len(word) > 64 or b"/" in word or not all(32 < byte < 127 for byte in word):
        return ""
    return word.decode("ascii")
