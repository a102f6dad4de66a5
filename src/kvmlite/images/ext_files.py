"""Files out of an ext2, ext3 or ext4 file system in an image, without mounting it: debugfs reads them.

The image is not trusted. Only names of plain characters are looked at, because they go into debugfs's command lines; files go
under names of ours into a directory of ours; and none may be larger than a limit.
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError, ImageError
from kvmlite.images.tool import run_tool
from kvmlite.records import dataclass

__all__ = ["ExtFiles", "is_plain"]

_HINT = "apt-get install e2fsprogs"
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+~@,-/")
_LINKS = 8
_FILE_LIMIT = 512 << 20
_TEXT_LIMIT = 4 << 20


def is_plain(path: str) -> bool:
    """Tell whether a path has only characters that mean nothing to debugfs, and does not climb up."""
    return path != "" and not set(path) - _PLAIN and ".." not in path.split("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inode:
    kind: str  # regular, directory, symlink ...
    size: int
    target: str


class ExtFiles:
    """Reads files of one file system.

    Args:
        disk: The image.
        offset: Where in it the file system begins, bytes.
        scratch: A private directory of ours.

    Raises:
        ConfigError: The image's path has a character that debugfs takes for something else.

    Thread: any one. Blocks.
    """

    def __init__(self, disk: str, offset: int, scratch: str) -> None:
        if "?" in disk:
            raise ConfigError(f"debugfs cannot open {disk!r}", hint="give the file a name without a question mark")
        self._device = f"{os.path.abspath(disk)}?offset={offset}"
        self._scratch = scratch
        self._inodes: dict[str, _Inode | None] = {}  # nobody writes to the image meanwhile

    def resolve(self, path: str) -> str | None:
        """Return the path of a file or directory with links at its end followed; None if it is not there."""
        for _ in range(_LINKS):
            inode = self._stat(path)
            if inode is None:
                return None
            if inode.kind != "symlink":
                return path
            path = os.path.normpath(os.path.join(os.path.dirname(path), inode.target))
        return None

    def regular(self, path: str) -> str | None:
        """Return the path of a regular file with links at its end followed; None if there is no such file."""
        found = self.resolve(path)
        inode = self._stat(found) if found else None
        return found if inode is not None and inode.kind == "regular" else None

    def has_directory(self, path: str) -> bool:
        """Tell whether there is such a directory, links followed."""
        found = self.resolve(path)
        inode = self._stat(found) if found else None
        return inode is not None and inode.kind == "directory"

    def names(self, directory: str) -> list[str]:
        """Return the plain names in a directory, sorted; none if there is no such directory."""
        found = self.resolve(directory)
        if found is None:
            return []
        names = []
        for line in self._ask(f"ls -p {found}").splitlines():
            fields = line.split("/")  # /inode/mode/uid/gid/name/size/
            if len(fields) == 8 and fields[1].isdecimal() and is_plain(fields[5]) and fields[5] not in (".", ".."):
                names.append(fields[5])
        return sorted(names)

    def read_text(self, path: str) -> str | None:
        """Return a text file's contents; None if it is not there."""
        found = self.regular(path)
        if found is None:
            return None
        inode = self._stat(found)
        if inode is None or inode.size > _TEXT_LIMIT:
            raise ImageError(f"{path} in the image has more than {_TEXT_LIMIT >> 20} MiB")
        target = os.path.join(self._scratch, "text")
        self.copy([(found, target)])
        with open(target, encoding="utf-8", errors="replace") as file:
            return file.read()

    def copy(self, pairs: list[tuple[str, str]]) -> None:
        """Copy files out: (path in the image, path on the host) each; directories of the host's paths are made.

        Raises:
            ImageError: One cannot be read, or is too large.
            HostError: The disk is full.
        """
        lines = []
        for number, (source, target) in enumerate(pairs):
            if not is_plain(source):
                raise ImageError(f"the image has a file {source!r}, which is no name to look for")
            os.makedirs(os.path.dirname(target), exist_ok=True)
            lines.append(f"dump {source} out{number}\n")
        self._debugfs(["-f", "-"], "".join(lines))
        for number, (source, target) in enumerate(pairs):
            try:
                os.rename(os.path.join(self._scratch, f"out{number}"), target)
            except FileNotFoundError as error:
                raise ImageError(f"{source} cannot be read out of the image") from error

    def _stat(self, path: str) -> _Inode | None:
        if path not in self._inodes:
            self._inodes[path] = self._ask_inode(path) if is_plain(path) else None
        return self._inodes[path]

    def _ask_inode(self, path: str) -> _Inode | None:
        text = self._ask(f"stat {path}")
        kind = _field(text, "Type: ")
        if not kind:
            return None
        size = _field(text, " Size: ")
        target = text.partition('Fast link dest: "')[2].partition('"\n')[0]
        if kind == "symlink" and not target:  # a long one is in a block of its own
            target = self._ask(f"cat {path}")
        return _Inode(kind=kind, size=int(size) if size.isdecimal() else 0, target=target)

    def _ask(self, request: str) -> str:
        return self._debugfs(["-R", request], "")

    def _debugfs(self, arguments: list[str], commands: str) -> str:
        done = run_tool(
            ["prlimit", f"--fsize={_FILE_LIMIT}", "debugfs", *arguments, self._device],
            hint=_HINT, cwd=self._scratch, input=commands, env={"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
        )  # fmt: skip
        if "No space left" in done.stderr:
            raise HostError(f"no space left in {self._scratch} for files of an image")
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")]
            raise ImageError(f"debugfs cannot read {self._device}: {(lines or ['no reason given'])[-1]}", hint=_HINT)
        return done.stdout


def _field(text: str, label: str) -> str:
    return (text.partition(label)[2].split() or [""])[0]
