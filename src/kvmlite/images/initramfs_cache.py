"""Base archives on disk, built once and shared by all runs.

``KEY.json`` says which archive belongs to a digest of inputs and which module files it was made of; ``DIGEST.cpio`` is
the archive. Both are written elsewhere and renamed, so readers see all or nothing, and two builders of the same archive
do each other no harm. An archive never changes; those used least recently go when there are too many.
"""

from __future__ import annotations

import os

from kvmlite.images.initramfs import Initramfs, file_signature
from kvmlite.images.staging import Staging, sweep, sync_file
from kvmlite.paths import cache_home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.images.cpio import CpioTree
    from kvmlite.images.modules import ModulePlan

__all__ = ["BaseCache"]

_MAX_SIZE = 512 << 20
_MAX_COUNT = 64
_MIN_AGE_S = 600
_PARTS = ("modules", "builtin", "missing", "unknown")


class BaseCache:
    """The cached archives in ``${XDG_CACHE_HOME:-~/.cache}/kvmlite/initramfs``.

    Args:
        directory: Another place for them.
        max_size: Bytes of archives to keep.
        min_age_s: Archives used less than this long ago are kept whatever the size: a run may be about to open them.
    """

    def __init__(
        self, directory: str | None = None, *, max_size: int = _MAX_SIZE, min_age_s: float = _MIN_AGE_S
    ) -> None:
        self.directory = directory or os.path.join(cache_home(), "initramfs")
        self._max_size = max_size
        self._min_age_s = min_age_s

    def find(self, key: str) -> Initramfs | None:
        """Return the archive for ``key`` if it is there, whole, and its module files are as they were."""
        import json

        try:
            with open(os.path.join(self.directory, key + ".json"), "rb") as file:
                entry = json.load(file)
            path = os.path.join(self.directory, entry["archive"])
            is_current = all(file_signature(signature[0]) == signature for signature in entry["inputs"])
            if not is_current or os.stat(path).st_size != entry["size"]:
                return None
            found = _make(path, entry["size"], {name: tuple(entry[name]) for name in _PARTS})
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None  # not there, or damaged: it is built again
        _touch(path)
        return found

    def add(self, key: str, tree: CpioTree, plan: ModulePlan, inputs: list[list[str | int]]) -> Initramfs:
        """Write an archive and return it.

        A cache that cannot be written (read-only, full) is no error: the archive is then kept in memory.
        """
        names = tuple([module.name for module in plan.load])
        parts = {"modules": names, "builtin": plan.builtin, "missing": plan.missing, "unknown": plan.unknown}
        try:
            path, size = self._write(key, tree, parts, inputs)
        except OSError:
            memfd, size = _write_memfd(tree)
            return _make(f"/proc/self/fd/{memfd}", size, parts, memfd)
        self._evict(keep=path)
        return _make(path, size, parts)

    def _write(
        self, key: str, tree: CpioTree, parts: dict[str, tuple[str, ...]], inputs: list[list[str | int]]
    ) -> tuple[str, int]:
        import hashlib
        import json

        sweep(self.directory)
        with Staging(self.directory) as staging:
            digest, size = hashlib.sha256(), 0
            draft = os.path.join(staging.path, "archive")
            with open(draft, "wb") as file:
                for chunk in tree.chunks():
                    digest.update(chunk)
                    size += file.write(chunk)
            sync_file(draft)
            name = digest.hexdigest() + ".cpio"
            path = os.path.join(self.directory, name)
            os.rename(draft, path)
            entry = {"format": 1, "archive": name, "size": size, "inputs": inputs, **parts}
            with open(draft, "w", encoding="utf-8") as text:
                json.dump(entry, text)
            os.rename(draft, os.path.join(self.directory, key + ".json"))
        return path, size

    def _evict(self, keep: str) -> None:
        """Remove archives, least recently used first, until the rest fits; then entries that lost theirs."""
        import time

        archives = []
        for name in self._names(".cpio"):
            path = os.path.join(self.directory, name)
            found = file_signature(path)
            if len(found) > 1:
                archives.append((int(found[2]), int(found[1]), path))
        archives.sort()
        total, now = sum(size for _, size, _ in archives), time.time_ns()
        while archives and (total > self._max_size or len(archives) > _MAX_COUNT):
            used_ns, size, path = archives.pop(0)
            if path != keep and now - used_ns >= self._min_age_s * 1e9:
                _unlink(path)
            total -= size
        self._drop_orphans()

    def _names(self, ending: str) -> list[str]:
        try:
            return [name for name in os.listdir(self.directory) if name.endswith(ending)]
        except OSError:
            return []  # removed meanwhile: nothing to evict

    def _drop_orphans(self) -> None:
        import json

        for name in self._names(".json"):
            path = os.path.join(self.directory, name)
            try:
                with open(path, "rb") as file:
                    is_orphan = not os.path.exists(os.path.join(self.directory, json.load(file)["archive"]))
            except (OSError, ValueError, KeyError, TypeError):
                is_orphan = True  # damaged, or another process removes it at this moment
            if is_orphan:
                _unlink(path)


def _make(path: str, size: int, parts: dict[str, tuple[str, ...]], memfd: int = -1) -> Initramfs:
    return Initramfs(
        path=path,
        size=size,
        modules=parts["modules"],
        builtin=parts["builtin"],
        missing=parts["missing"],
        unknown=parts["unknown"],
        memfd=memfd,
    )


def _touch(path: str) -> None:
    """Note that an archive was used; a cache that only others may write keeps its own order."""
    try:
        os.utime(path)
    except OSError:
        return


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # another process was faster, or it is not ours


def _write_memfd(tree: CpioTree) -> tuple[int, int]:
    memfd, size = os.memfd_create("kvmlite-initramfs", os.MFD_CLOEXEC), 0
    try:
        with open(memfd, "wb", closefd=False) as file:
            for chunk in tree.chunks():
                size += file.write(chunk)
    except BaseException:
        os.close(memfd)
        raise
    return memfd, size
