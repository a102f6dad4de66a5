"""Private working directories: everything is finished there, then renamed into place.

A staging directory lies in the directory it publishes to (same file system, so the rename is atomic) and is locked
with ``flock`` for as long as its process lives. Whatever ends the work early (an error, Ctrl-C, a full disk) removes
it; after a kill or a power cut :func:`sweep` does so at the next start, knowing by the lock which ones are in use.
"""

from __future__ import annotations

import errno
import fcntl
import os

from kvmlite.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Staging", "StoreLock", "storage_error", "sweep", "sync_file"]

PREFIX = ".staging-"

_HINTS = {
    errno.ENOSPC: "free some space there, or set KVMLITE_HOME to a directory on another file system",
    errno.EDQUOT: "the disk quota is used up; set KVMLITE_HOME to a directory elsewhere",
    errno.EFBIG: "no file there can be so large, or the limit of this process is too small (ulimit -f)",
    errno.EROFS: "set KVMLITE_HOME to a directory that can be written",
    errno.EACCES: "set KVMLITE_HOME to a directory that you may write to",
    errno.EPERM: "set KVMLITE_HOME to a directory that you may write to",
}


def storage_error(error: OSError, doing: str) -> HostError:
    """Turn a failed file operation into one line: what was attempted, where, and why it failed."""
    code = error.errno or 0
    reason = os.strerror(code) if code else str(error)
    return HostError(f"{doing}: {reason}", code, hint=_HINTS.get(code, ""))


def sync_file(path: str) -> None:
    """Write a file's or directory's data to the disk. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Staging:
    """A locked, private directory inside ``parent``; gone when the ``with`` block is left.

    Attributes:
        path: The directory; whatever was not renamed out of it is removed at the end.

    Thread: any one thread. Blocks on disk only.
    """

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.path = ""
        self._lock_fd = -1

    def __enter__(self) -> Staging:
        try:
            os.makedirs(self.parent, mode=0o755, exist_ok=True)
            while not self._create():
                pass
        except OSError as error:
            self.close()
            raise storage_error(error, f"cannot create a working directory in {self.parent}") from error
        except BaseException:
            self.close()
            raise
        return self

    def _create(self) -> bool:
        """Make and lock the directory; False if a sweeper took it in between."""
        self.path = os.path.join(self.parent, f"{PREFIX}{os.getpid()}-{os.urandom(6).hex()}")
        os.mkdir(self.path, 0o700)
        try:
            self._lock_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            os.stat(self.path)  # locked, but is it still there?
        except FileNotFoundError:
            self.close()
            return False
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the directory with all that is left in it, then give up the lock.

        What cannot be removed now (an error of the disk) is left to the next ``sweep``: how the work itself ended
        matters more to the caller.
        """
        try:
            if self.path:
                _remove_tree(self.path)
        except OSError:
            pass
        finally:
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1


class StoreLock:
    """Hold the lock of a store while names and entries change; waits for other processes."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._fd = -1

    def __enter__(self) -> StoreLock:
        path = os.path.join(self._root, ".lock")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as error:
            self.__exit__(None, None, None)
            raise storage_error(error, f"cannot lock the store {self._root}") from error
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sweep(parent: str) -> tuple[str, ...]:
    """Remove staging directories that dead processes left in ``parent``.

    One that is locked belongs to a living process and stays. A directory that cannot be removed (another user's)
    stays too: it does no harm but take space.

    Returns:
        The paths removed.
    """
    try:
        names = os.listdir(parent)
    except OSError:
        return ()  # no such directory, or not ours to read: nothing to sweep
    removed = []
    for name in sorted(names):
        if name.startswith(PREFIX) and _sweep_one(os.path.join(parent, name)):
            removed.append(os.path.join(parent, name))
    return tuple(removed)


def _sweep_one(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # already gone, or not ours
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_tree(path)
    except OSError:
        return False  # in use, or not ours
    finally:
        os.close(fd)
    return True


def _remove_tree(path: str) -> None:
    """Remove a directory tree; missing is fine. Follows no links."""
    if not os.path.lexists(path):
        return
    for directory, directories, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(os.path.join(directory, name))
        for name in directories:
            child = os.path.join(directory, name)
            if os.path.islink(child):
                os.unlink(child)
            else:
                os.rmdir(child)
    os.rmdir(path)
