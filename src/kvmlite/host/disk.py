"""Disk images of the host: raw files and block devices, opened and locked."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct

from kvmlite.errors import HostError, ImageError

_BLKSSZGET = 0x1268
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len (0: to the end), l_pid
_DIRECT_SIZES = (512, 1024, 2048, 4096)
_QEMU_USES, _QEMU_KEEPS_OUT = 100, 200
_QEMU_WRITES = (1, 3)  # BLK_PERM_WRITE, BLK_PERM_RESIZE
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


class DiskFile:
    """A raw image or block device. Its owner closes it.

    Nobody else that locks images (kvmlite, QEMU) writes to it meanwhile: a writer locks it for itself, readers share.

    Args:
        path: The file.
        read_only: Never write.
        direct: Go past the host's page cache.

    Attributes:
        fd: Its descriptor.
        size: Bytes.
        block_size: Bytes of the smallest piece that can be read or written.
        is_device: It is a block device.

    Raises:
        HostError: It cannot be opened, or somebody else uses it.
        ImageError: It is no disk: empty, of an odd size, neither file nor block device.
    """

    __slots__ = ("block_size", "fd", "is_device", "path", "size")

    def __init__(self, path: str, *, read_only: bool = False, direct: bool = False) -> None:
        self.path = path
        self.fd = -1
        self.is_device = self._check_kind()
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)
        if self.is_device and not read_only:
            flags |= os.O_EXCL  # refused while the host has it mounted
        try:
            self.fd = os.open(path, flags)
        except OSError as error:
            raise _open_error(path, error, flags) from error
        try:
            lock_image(self.fd, path, writer=not read_only)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            self.block_size = self._find_block_size(direct)
            self._check_size()
        except BaseException:
            self.close()
            raise

    def _check_kind(self) -> bool:
        try:
            mode = os.stat(self.path).st_mode
        except OSError as error:
            raise _open_error(self.path, error, os.O_RDONLY) from error
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ImageError(f"disk {self.path} is neither a file nor a block device")
        return stat.S_ISBLK(mode)

    def _find_block_size(self, direct: bool) -> int:
        if self.is_device:
            answer = fcntl.ioctl(self.fd, _BLKSSZGET, bytes(4))
            return int.from_bytes(answer, "little")
        if not direct:
            return _DIRECT_SIZES[0]
        with mmap.mmap(-1, 2 * _DIRECT_SIZES[-1]) as memory, memoryview(memory) as view:
            for size in _DIRECT_SIZES:
                try:
                    os.preadv(self.fd, [view[size : 2 * size]], size)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise HostError(f"cannot read {self.path}: {error.strerror}", error.errno or 0) from error
                else:
                    return size
        raise HostError(
            f"disk {self.path} cannot be read past the page cache", errno.EINVAL, hint="leave direct I/O off for it"
        )

    def _check_size(self) -> None:
        if self.size == 0:
            raise ImageError(f"disk {self.path} is empty", hint=f"make it larger: truncate -s 1G {self.path}")
        if self.size % self.block_size:
            rounded = (self.size // self.block_size + 1) * self.block_size
            raise ImageError(
                f"disk {self.path} has {self.size} bytes, not a whole number of {self.block_size}-byte blocks",
                hint=f"if it is a raw image that was cut short: truncate -s {rounded} {self.path}",
            )

    def close(self) -> None:
        """Close the descriptor, and with it the lock; twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def lock_image(fd: int, path: str, *, writer: bool) -> None:
    """Lock an image for its only writer, or for one of its readers, as long as the open file description lives.

    QEMU's locks count, and it minds ours: a writer locks the whole file, of which QEMU locks single bytes (``file-posix.c``:
    100 + n to use permission n, 200 + n to keep others from it); a reader keeps QEMU from writing and leaves its readers alone.
    The lock goes with the last descriptor, also when the process is killed. On a file system without locks there is none.

    Raises:
        HostError: Somebody else uses the image.
    """
    if writer:
        _lock(fd, path, fcntl.F_WRLCK, 0, 0)
        return
    for byte in (0, *(_QEMU_KEEPS_OUT + permission for permission in _QEMU_WRITES)):
        _lock(fd, path, fcntl.F_RDLCK, byte, 1)
    if any(_is_held(fd, _QEMU_USES + permission, 1) for permission in _QEMU_WRITES):
        raise _in_use(path, "writes to it", errno.EAGAIN)


def _lock(fd: int, path: str, kind: int, start: int, size: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, size, 0))
    except OSError as error:
        if error.errno not in _BUSY:
            return
        raise _in_use(path, "writes to it" if kind == fcntl.F_RDLCK else "uses it", error.errno) from error


def _in_use(path: str, how: str, error: int) -> HostError:
    return HostError(
        f"disk {path} is in use: another virtual machine, or another disk of this one, {how}",
        error,
        hint="end that machine, or give this one a private overlay of an image that nobody writes to",
    )


def is_locked(fd: int) -> bool:
    """Tell whether somebody else has an image open that ``lock_image`` has locked; takes no lock."""
    return _is_held(fd, 0, 0)


def _is_held(fd: int, start: int, size: int) -> bool:
    probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, size, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe)
    except OSError:
        return False  # a file system without locks
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _open_error(path: str, error: OSError, flags: int) -> HostError:
    hint = ""
    if error.errno == errno.ENOENT:
        hint = f"check its name; truncate -s 1G {path} makes an empty one"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        is_written = bool(flags & os.O_RDWR)
        hint = "open it read-only, or get the right to write to it" if is_written else "get the right to read it"
    elif error.errno == errno.EBUSY:
        hint = "the host has it mounted or in use: unmount it first"
    elif error.errno == errno.EINVAL and flags & os.O_DIRECT:
        hint = "its file system has no direct I/O: leave that off"
    return HostError(f"cannot open disk {path}: {error.strerror}", error.errno or 0, hint=hint)
