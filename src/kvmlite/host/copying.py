"""Copies of large files that take no time or no space: blocks shared by reflink, holes left out."""

from __future__ import annotations

import errno
import fcntl
import os

__all__ = ["clone_file", "copy_sparse", "next_data"]

_FICLONE = 0x40049409
_NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.ETXTBSY)
_CHUNK = 64 << 20


def next_data(fd: int, offset: int) -> tuple[int, int] | None:
    """Return begin and end of the first data at or behind ``offset``; None if only a hole follows."""
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    return start, os.lseek(fd, start, os.SEEK_HOLE)


def clone_file(source_fd: int, target_fd: int) -> bool:
    """Make one file a copy of another by letting it share all its blocks (reflink).

    Returns:
        False if the file system cannot do so, or they lie on two.

    Raises:
        OSError: It can, and failed: the disk is full, say.
    """
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def copy_sparse(source: str, target: str) -> None:
    """Copy a file to a new one, mode 0600: by reflink where the file system can, else its data without its holes.

    Raises:
        OSError: A file cannot be opened, read or written; ``target`` may be left incomplete.

    Thread: any. Blocks on disk.
    """
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if not clone_file(source_fd, target_fd):
                os.truncate(target_fd, os.fstat(source_fd).st_size)
                _copy_data(source_fd, target_fd)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def _copy_data(source_fd: int, target_fd: int) -> None:
    offset = 0
    while (found := next_data(source_fd, offset)) is not None:
        start, end = found
        while start < end:
            count = os.copy_file_range(source_fd, target_fd, min(_CHUNK, end - start), start, start)
            if count == 0:
                return  # the file became shorter
            start += count
        offset = end
