"""Write cpio archives in the ``newc`` format, the one the kernel unpacks into its first root file system.

A member is a header of 110 ASCII bytes (``070701`` and thirteen 8-digit hexadecimal fields: ino mode uid gid nlink mtime
filesize devmajor devminor rdevmajor rdevminor namesize check), its name with a NUL, and its data; name and data are each
padded with NULs to 4 bytes. Archives may follow one another at 4-byte boundaries; later files replace earlier ones
(Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

The same tree gives the same bytes: times are 0, owners are root, inodes count up from 1, names are sorted.
"""

from __future__ import annotations

from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CpioTree", "Member"]

S_IFDIR, S_IFCHR, S_IFREG, S_IFLNK = 0o040000, 0o020000, 0o100000, 0o120000
_MAX_NAME = 4096
_MAX_FILE_SIZE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of an archive: type and permission bits, data (or link target), device numbers."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class CpioTree:
    """A tree of files to be archived; paths are the guest's and absolute (``/bin/sh``).

    Missing parent directories are added (mode 0755). A path may be given once, directories again with the same mode.
    """

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}

    def __contains__(self, path: str) -> bool:
        return _clean(path) in self._members

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        name = _clean(path)
        member = Member(mode=S_IFDIR | mode)
        if self._members.get(name) != member:
            self._add(path, name, member)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        if len(data) > _MAX_FILE_SIZE:
            raise ConfigError(f"{path} is too large for an initial RAM file system: {len(data)} bytes")
        self._add(path, _clean(path), Member(mode=S_IFREG | mode, data=data))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, _clean(path), Member(mode=S_IFLNK | 0o777, data=target.encode()))

    def device(self, path: str, mode: int, major: int, minor: int) -> None:
        """Add a character device node; needs no privilege, the guest's kernel makes it."""
        self._add(path, _clean(path), Member(mode=S_IFCHR | mode, device=(major, minor)))

    def _add(self, path: str, name: str, member: Member) -> None:
        if name in self._members:
            raise ConfigError(f"{path} is in the guest's initial file system twice")
        parent = name.rpartition("/")[0]
        if parent and parent not in self._members:
            self.directory("/" + parent)
        if parent and self._members[parent].mode & 0o170000 != S_IFDIR:
            raise ConfigError(f"{path} lies below /{parent}, which is not a directory")
        self._members[name] = member

    def chunks(self) -> Iterator[bytes]:
        """Give the archive in pieces, with its end mark; the sum of sizes is a multiple of 4."""
        for inode, name in enumerate(sorted(self._members), start=1):
            member = self._members[name]
            yield _header(inode, name, member)
            if member.data:
                yield member.data
                yield _padding(len(member.data))
        yield _header(0, "TRAILER!!!", Member(mode=0))

    def to_bytes(self) -> bytes:
        """Return the whole archive."""
        return b"".join(self.chunks())


def _clean(path: str) -> str:
    """Return the name in the archive (no leading slash) of an absolute guest path."""
    name = path[1:]
    parts = name.split("/")
    if not path.startswith("/") or "" in parts or "." in parts or ".." in parts or "\0" in path:
        raise ConfigError(f"{path!r} is not an absolute, plain path in the guest")
    if len(name.encode()) >= _MAX_NAME:
        raise ConfigError(f"path in the guest is longer than {_MAX_NAME - 1} bytes: {path[:40]!r}...")
    return name


def _header(inode: int, name: str, member: Member) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if member.mode & 0o170000 == S_IFDIR else 1
    major, minor = member.device
    fields = (inode, member.mode, 0, 0, links, 0, len(member.data), 0, 0, major, minor, len(encoded), 0)
    header = b"070701" + b"".join([b"%08X" % field for field in fields]) + encoded
    return header + _padding(len(header))


def _padding(size: int) -> bytes:
    return b"\0" * (-size % 4)
