"""A private copy of a disk image for one machine, thrown away with it.

Where the image's file system can share blocks between files (btrfs, XFS, bcachefs), the copy is a reflink and as fast as
any file. Elsewhere it is a sparse file that holds what was written; what was not is read from the image (``cow.c``).
Either has no name: nothing is left behind, however the process ends.
"""

from __future__ import annotations

import errno
import os

from kvmlite.errors import HostError
from kvmlite.host.copying import clone_file
from kvmlite.paths import cache_home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmlite.host.disk import DiskFile


class PrivateCopy:
    """Where a machine writes instead of to the image.

    Args:
        image: Opened for reading; stays its owner's.

    Attributes:
        fd: A file of the image's size, nameless.
        is_complete: It has the image's contents; else it is empty, and unwritten parts are the image's.

    Raises:
        HostError: There is nowhere to put it.
    """

    __slots__ = ("fd", "is_complete")

    def __init__(self, image: DiskFile) -> None:
        self.is_complete = False
        self.fd = _open_nameless(_directories(image), image.path)
        try:
            if not image.is_device:
                self.is_complete = self._clone(image)
            if not self.is_complete:
                os.truncate(self.fd, image.size)
        except BaseException:
            self.close()
            raise

    def _clone(self, image: DiskFile) -> bool:
        try:
            return clone_file(image.fd, self.fd)
        except OSError as error:
            raise HostError(f"cannot copy disk {image.path}: {error.strerror}", error.errno or 0) from error

    def close(self) -> None:
        """Throw it away; twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _directories(image: DiskFile) -> Iterable[str]:
    """Where the copy may be, best first: beside the image for a reflink, else where caches are; both are real disks."""
    if not image.is_device:
        yield os.path.dirname(os.path.realpath(image.path))
    cache = cache_home()
    try:
        os.makedirs(cache, exist_ok=True)
        yield cache
    except OSError:  # no home to write to
        pass
    yield "/var/tmp"


def _open_nameless(directories: Iterable[str], path: str) -> int:
    import tempfile

    reason = OSError(errno.EACCES, os.strerror(errno.EACCES))
    for directory in directories:
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            reason = error
        if reason.errno != errno.EOPNOTSUPP:
            continue
        try:  # a file system that cannot make nameless files: take the name away
            fd, name = tempfile.mkstemp(prefix=".kvmlite-", dir=directory)
        except OSError as error:
            reason = error
            continue
        os.unlink(name)
        return fd
    raise HostError(
        f"there is nowhere to keep what the machine writes to {path}: {reason.strerror}",
        reason.errno or 0,
        hint="set XDG_CACHE_HOME to a directory that can be written to",
    )
