"""Open a kernel file and say what it is: by its content, never by its name.

Only headers are read here. What a refused file really is, is found out in ``boot.diagnosis``.
"""

from __future__ import annotations

import os
from stat import S_ISREG

from kvmlite.abi import elf as elf_abi
from kvmlite.abi import linux_boot
from kvmlite.errors import ImageError, KvmliteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal, Self

    from kvmlite.boot.bzimage import BzImage
    from kvmlite.boot.elf import ElfKernel
    from kvmlite.boot.multiboot import MultibootHeader

    Protocol = Literal["linux", "pvh", "multiboot"]

_HEAD_SIZE = 4096


class KernelImage:
    """An open, recognised kernel file; owns ``fd``. A context manager.

    Exactly one of these holds: ``bzimage`` is set, ``elf`` is set, or both are None and ``multiboot`` is set
    (a flat image with the a.out kludge). May be used by one thread at a time.

    Attributes:
        path: As given.
        fd: Open for reading, close-on-exec; -1 after ``close()``.
        size: Bytes of the file.
        elf: Headers of an ELF kernel.
        bzimage: Setup header of a bzImage.
    """

    __slots__ = ("_multiboot", "_searched", "bzimage", "elf", "fd", "path", "size")

    def __init__(
        self,
        path: str,
        fd: int,
        size: int,
        *,
        elf: ElfKernel | None = None,
        bzimage: BzImage | None = None,
    ) -> None:
        self.path = path
        self.fd = fd
        self.size = size
        self.elf = elf
        self.bzimage = bzimage
        self._multiboot: MultibootHeader | None = None
        self._searched = bzimage is not None

    @property
    def multiboot(self) -> MultibootHeader | None:
        """The multiboot 1 header, looked for on first use; None if there is none."""
        if not self._searched:
            from kvmlite.boot.multiboot import find_header

            self._multiboot = find_header(os.pread(self.fd, 8192, 0))
            self._searched = True
        return self._multiboot

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """Ways to start this kernel, the preferred one first; never empty for an image from ``open_kernel``."""
        if self.bzimage is not None:
            return ("linux",)
        ways: list[Protocol] = []
        if self.elf is not None:
            if self.elf.is_linux:
                ways.append("linux")
            if self.elf.pvh_entry is not None:
                ways.append("pvh")
        if self.multiboot is not None:
            ways.append("multiboot")
        return tuple(ways)

    @property
    def preferred_protocol(self) -> Protocol:
        """The first of ``protocols``; does not look for what comes later."""
        if self.bzimage is not None or (self.elf is not None and self.elf.is_linux):
            return "linux"
        if self.elf is not None and self.elf.pvh_entry is not None:
            return "pvh"
        if self.multiboot is not None:
            return "multiboot"
        raise ImageError(
            f"{self.path}: is an ELF that is no Linux kernel and has no PVH note or multiboot header",
            hint="a kernel of your own needs an XEN_ELFNOTE_PHYS32_ENTRY note",
        )

    def close(self) -> None:
        """Close the file; again is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_kernel(path: str | os.PathLike[str]) -> KernelImage:
    """Open a kernel and check that it is one: bzImage, ELF (Linux, PVH, multiboot) or flat multiboot.

    Returns:
        The image; the caller closes it.

    Raises:
        ImageError: the file cannot be read, or is no kernel kvmlite can start; the message says what it is instead.
    """
    name = os.fspath(path)
    fd = -1
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return _identify(fd, name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if fd >= 0:
            os.close(fd)
        if isinstance(error, KvmliteError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(
            f"{name!r}: cannot read the kernel: {reason}", hint="check the path and its permissions"
        ) from error
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise


def _identify(fd: int, path: str) -> KernelImage:
    status = os.fstat(fd)
    if not S_ISREG(status.st_mode):
        from kvmlite.boot.diagnosis import file_kind

        raise ImageError(f"{path}: is {file_kind(status.st_mode)}, not a kernel file")
    size = status.st_size
    head = os.pread(fd, _HEAD_SIZE, 0)
    if head.startswith(elf_abi.ELFMAG):
        from kvmlite.boot.elf import parse_elf

        image = KernelImage(path, fd, size, elf=parse_elf(fd, size, path, head))
        _ = image.preferred_protocol  # refuses an ELF that nothing can start
        return image
    if head[linux_boot.HEADER : linux_boot.HEADER + 4] == linux_boot.HDRS_MAGIC:
        from kvmlite.boot.bzimage import parse_bzimage

        return KernelImage(path, fd, size, bzimage=parse_bzimage(head, size, path))
    image = KernelImage(path, fd, size)
    if size and image.multiboot is not None:
        if image.multiboot.addresses is None:
            raise ImageError(f"{path}: has a multiboot header, but is no ELF and gives no load addresses")
        return image
    from kvmlite.boot.diagnosis import describe

    what, hint = describe(head, size)
    raise ImageError(f"{path}: {what}", hint=hint)
