"""ext4 file systems made of directories, without mounting anything: mke2fs copies the files in.

Another user's files need either root or fakeroot, under which mke2fs sees the owners that a tar gave them.
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError
from kvmlite.images.tool import run_tool, tool_failure

__all__ = ["add_journal", "make_empty", "make_ext4"]

_HINT = "apt-get install e2fsprogs"
_SPARE = 1 << 30
"""Bytes of free space in an image when nobody says otherwise. The file is sparse: it costs nothing."""

_BLOCK = 4096
_SPARE_PER_INODE = 16384
# Named one by one: what mke2fs takes by default is the distribution's choice, and older kernels must mount it. No journal
# and no checksums: most images are never written to, and a volume made of one is given a journal.
_FEATURES = (
    "none", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg", "sparse_super",
    "large_file", "huge_file", "dir_nlink", "extra_isize", "uninit_bg",
)  # fmt: skip


def _needed_size(tree: str) -> tuple[int, int]:
    """Return how many bytes the files below ``tree`` take on a disk, and how many inodes.

    Raises:
        HostError: A directory cannot be read.
    """
    size, count, seen = 0, 1, set()

    def fail(error: OSError) -> None:
        raise HostError(f"cannot read {error.filename}: {error.strerror}", error.errno or 0) from error

    for parent, directories, files in os.walk(tree, onerror=fail):
        for name in (*directories, *files):
            found = os.lstat(os.path.join(parent, name))
            if found.st_nlink > 1 and not os.path.isdir(os.path.join(parent, name)):
                if (found.st_dev, found.st_ino) in seen:
                    continue
                seen.add((found.st_dev, found.st_ino))
            count += 1
            rounded = (found.st_size + _BLOCK - 1) // _BLOCK * _BLOCK
            size += min(rounded, found.st_blocks * 512 + _BLOCK)  # sparse files stay sparse
    return size, count


def make_ext4(tree: str, target: str, *, size: int | None, wrap: tuple[str, ...] = ()) -> None:
    """Make a sparse ext4 image of a directory.

    Args:
        tree: The directory.
        target: The file, which must not exist.
        size: Of the file system, bytes; None for what the files need and ``_SPARE``.
        wrap: Put before the command: fakeroot and its state.

    Raises:
        ConfigError: The files do not fit into ``size``.
        UnsupportedError: This host has no mke2fs.
        HostError: mke2fs failed, or the disk is full.

    Thread: any. Blocks: it copies all files.
    """
    content, count = _needed_size(tree)
    least = content + count * 256 + (content >> 6) + (1 << 20)
    if size is None:
        size = (least + _SPARE + (1 << 20) - 1) >> 20 << 20
    if size < least:
        raise ConfigError(
            f"the files take {least >> 20} MiB, more than the {size >> 20} MiB of --size",
            hint=f"give more, with a unit: --size {-(-(least * 2) >> 20)}M",
        )
    inodes = count + count // 16 + (size - least) // _SPARE_PER_INODE + 16
    command = [
        *wrap, "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", "256", "-N", str(inodes), "-m", "0",
        "-O", ",".join(_FEATURES), "-E", "root_owner=0:0", "-d", tree, target, str(size >> 10) + "k",
    ]  # fmt: skip
    done = run_tool(command, hint=_HINT)
    if done.returncode != 0 and "Could not allocate" in done.stderr:
        raise ConfigError(f"the files do not fit into {size >> 20} MiB", hint="give more: --size")
    if done.returncode != 0:
        raise tool_failure(f"mke2fs of {tree} failed", done)


def make_empty(path: str) -> None:
    """Make an ext4 file system with a journal in a file, as large as that is.

    Raises:
        UnsupportedError: This host has no mke2fs.
        HostError: mke2fs failed, or the disk is full.
    """
    features = ",".join((*_FEATURES, "has_journal"))
    done = run_tool(
        [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-m",
            "0",
            "-O",
            features,
            "-E",
            "root_owner=0:0,lazy_journal_init=1",
            path,
        ],
        hint=_HINT,
    )
    if done.returncode != 0:
        raise tool_failure(f"mke2fs of {path} failed", done)


def add_journal(path: str) -> None:
    """Give the ext4 file system in a file a journal, so that a power cut does it no harm.

    Raises:
        UnsupportedError: This host has no tune2fs.
        HostError: tune2fs failed, or the disk is full.
    """
    size_mib = min(16, max(4, os.stat(path).st_size >> 24))  # at least 1024 blocks
    done = run_tool(["tune2fs", "-O", "has_journal", "-J", f"size={size_mib}", path], hint=_HINT)
    if done.returncode != 0:
        raise tool_failure(f"tune2fs of {path} failed", done)
