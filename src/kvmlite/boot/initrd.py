"""The initial RAM disk: one or more archives, placed behind each other high in low RAM."""

from __future__ import annotations

import os
import stat

from kvmlite.abi import layout
from kvmlite.boot.entry import is_ram, mebibytes, memory_option, read_file
from kvmlite.errors import ConfigError, ImageError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from kvmlite.boot.entry import Ram

    InitrdPart = str | os.PathLike[str] | bytes

_ALIGN = 4  # where the kernel looks for the next archive (Documentation/driver-api/early-userspace/buffer-format.rst)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    name: str
    size: int
    fd: int = -1
    data: bytes = b""


class Initrd:
    """Files and byte strings that make one initrd; owns the files' fds. A context manager.

    Args:
        parts: Paths (str or PathLike) and contents (bytes), in order; the kernel unpacks a later one over an
            earlier one.

    Raises:
        ImageError: a file cannot be read, is no regular file or is empty.
    """

    def __init__(self, parts: Iterable[InitrdPart]) -> None:
        self._parts: list[_Part] = []
        try:
            for part in parts:
                self._parts.append(_bytes_part(part) if isinstance(part, bytes) else _file_part(os.fspath(part)))
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes in guest memory, with the padding between parts."""
        return sum(_padded(part.size) for part in self._parts[:-1]) + self._parts[-1].size if self._parts else 0

    @property
    def name(self) -> str:
        """For messages: the parts' names."""
        return " + ".join(part.name for part in self._parts)

    def place(self, memory: Ram, *, floor: int, limit: int) -> int:
        """Find where the initrd goes: as high as possible in low RAM, on a page.

        Args:
            memory: Guest RAM.
            floor: First GPA after the kernel and the memory it runs in.
            limit: First GPA the initrd must not reach (``initrd_addr_max`` + 1, the 32-bit hole).

        Returns:
            GPA of its first byte.

        Raises:
            ConfigError: there is no room; says how much memory there would have to be.
        """
        size = self.size
        low_ram = [region for region in memory.regions if region.gpa < layout.HOLE_START]
        top = min(max((region.gpa + region.size for region in low_ram), default=0), limit)
        gpa = (top - size) // layout.PAGE_SIZE * layout.PAGE_SIZE
        if gpa >= floor and is_ram(memory, gpa, size):
            return gpa
        needed = floor + size + layout.PAGE_SIZE
        hint = f"give the guest more memory: --memory {memory_option(needed)}"
        if needed > limit:
            hint = f"this kernel takes initrds below {limit:#x} only: make the initrd smaller"
        raise ConfigError(
            f"initrd {self.name} of {mebibytes(size)} does not fit between the kernel (ends at {floor:#x}) and "
            f"{top:#x} in a guest of {mebibytes(memory.size)}",
            hint=hint,
        )

    def load(self, memory: Ram, gpa: int) -> None:
        """Copy all parts to guest RAM at ``gpa``, which ``place`` gave."""
        for part in self._parts:
            if part.fd >= 0:
                read_file(memory, gpa, part.fd, 0, part.size, part.name)
            else:
                memory.write(gpa, part.data)
            gap = _padded(part.size) - part.size
            if gap and part is not self._parts[-1]:
                memory.write(gpa + part.size, bytes(gap))
            gpa += _padded(part.size)

    def close(self) -> None:
        """Close the files; again is harmless."""
        parts, self._parts = self._parts, []
        for part in parts:
            if part.fd >= 0:
                os.close(part.fd)

    def __enter__(self) -> Initrd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _padded(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def _bytes_part(data: bytes) -> _Part:
    if not data:
        raise ImageError("an initrd given as bytes is empty")
    return _Part(name=f"({mebibytes(len(data))} of bytes)", size=len(data), data=data)


def _file_part(path: str) -> _Part:
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: is not a regular file, cannot be an initrd")
        if not status.st_size:
            raise ImageError(f"{path}: is an empty file, cannot be an initrd")
        return _Part(name=path, size=status.st_size, fd=fd)
    except (OSError, ValueError) as error:
        if fd >= 0:
            os.close(fd)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(
            f"{path!r}: cannot read the initrd: {reason}", hint="check the path and its permissions"
        ) from error
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise


def open_initrd(given: InitrdPart | Iterable[InitrdPart]) -> Initrd:
    """Open an initrd given as one path, one byte string or several of them.

    Raises:
        ImageError: a part cannot be read or is empty, or there is none.
    """
    parts = [given] if isinstance(given, (str, bytes, os.PathLike)) else list(given)
    if not parts:
        raise ImageError("the list of initrds is empty")
    return Initrd(parts)
