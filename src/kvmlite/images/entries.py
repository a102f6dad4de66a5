"""Entries of a store: directories named by a digest, and links that give them names. Kernels and images are kept so.

::

    ROOT/
      DIGEST/manifest.json ...        (an entry: complete, and never changed)
      names/NAME -> ../DIGEST         (a link can be made by one process only: names are unique)
      .lock                           (held while entries and names change)
      .staging-PID-...                (work in progress, see staging.py)
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, ImageError, StateError
from kvmlite.images.staging import Staging, StoreLock, storage_error, sweep, sync_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Entry = TypeVar("Entry")

__all__ = ["Draft", "Entries", "check_name", "digest_file", "is_name", "link_target", "now_text"]

MIN_DIGEST_PREFIX = 4
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+~-")


class Draft:
    """An entry being put together in a staging directory, before it has a digest.

    Put the files into ``path``. ``scratch`` is for whatever is not to be kept.
    """

    def __init__(self, staging: Staging) -> None:
        self.path = os.path.join(staging.path, "entry")
        self.scratch = os.path.join(staging.path, "scratch")
        os.mkdir(self.path, 0o755)
        os.mkdir(self.scratch, 0o755)


class Entries:
    """The entries and names below one directory.

    Args:
        root: The directory.
        noun: What messages call an entry: ``kernel``; also the command for it.
        format: Of the manifests, written and understood.
        remedy: How an entry is made again.

    Thread: any; any number of processes may use one store. Blocks on disk.
    """

    def __init__(self, root: str, noun: str, *, format: int, remedy: str) -> None:
        self.root = root
        self.noun = noun
        self._format = format
        self._remedy = remedy

    def staging(self) -> Staging:
        """Return a working directory in the store, after removing those that dead processes left."""
        sweep(self.root)
        return Staging(self.root)

    def digests(self) -> list[str]:
        """Return the digests of all entries."""
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(error, f"cannot read the {self.noun} store {self.root}") from error
        return sorted(name for name in names if len(name) == 64 and not set(name) - set("0123456789abcdef"))

    def load_all(self, load: Callable[[str, tuple[str, ...]], Entry]) -> tuple[list[Entry], list[str]]:
        """Return what ``load`` makes of each digest and its names, and what it says of those that are damaged."""
        names, found, broken = self.names(), [], []
        for digest in self.digests():
            try:
                found.append(load(digest, names.get(digest, ())))
            except ImageError as error:
                broken.append(str(error))
        return found, broken

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of each digest."""
        found: dict[str, tuple[str, ...]] = {}
        for name, digest in self._links():
            found[digest] = (*found.get(digest, ()), name)
        return found

    def named(self, name: str) -> str:
        """Return the digest that a name stands for; empty if there is none."""
        if not name or set(name) - _NAME_CHARACTERS or name in (".", ".."):
            return ""
        digest = link_target(os.path.join(self.root, "names", name))
        return digest if digest and os.path.isdir(os.path.join(self.root, digest)) else ""

    def directory(self, digest: str) -> str:
        """Return where an entry is."""
        return os.path.join(self.root, digest)

    def remedy(self, digest: str) -> str:
        """Return what to do about an entry that is damaged."""
        return f"{self._remedy} it again, or rm -r {self.directory(digest)}"

    def manifest(self, digest: str) -> dict[str, Any]:
        """Return what is written about an entry.

        Raises:
            ImageError: It is damaged, or of another version.
        """
        import json

        directory = self.directory(digest)
        try:
            with open(os.path.join(directory, "manifest.json"), "rb") as file:
                manifest = json.load(file)
            found = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(digest, error) from error
        if found != self._format:
            raise ImageError(
                f"{self.noun} {directory} has format {found}; this kvmlite reads {self._format}",
                hint=self.remedy(digest),
            )
        return dict(manifest)

    def damaged(self, digest: str, error: Exception) -> ImageError:
        """Return the error for an entry that is not as it was written."""
        return ImageError(
            f"{self.noun} {self.directory(digest)} is damaged: {_reason(error)}", hint=self.remedy(digest)
        )

    def publish(self, draft: Draft, manifest: dict[str, Any], *, name: str | None, base: str, replace: bool) -> str:
        """Move a finished draft into the store and name it; all or nothing.

        Args:
            draft: Complete, and not written to any more.
            manifest: What is written about it; ``digest`` names the entry. ``format`` and ``name`` are added.
            name: What to call it; the name it has, else ``base`` (with a number if that is taken) if None.
            base: See there.
            replace: Take ``name`` away from another entry.

        Returns:
            The digest.

        Raises:
            ConfigError: ``name`` is taken.
            OSError: The disk is full or not writable; nothing is left behind.
        """
        digest = str(manifest["digest"])
        with StoreLock(self.root):
            chosen = self._claim_name(name, base, digest, replace=replace)
            self._install(draft, {**manifest, "format": self._format, "name": chosen}, chosen)
        return digest

    def remove(self, digest: str, label: str, *, links: tuple[str, ...] = ()) -> None:
        """Remove an entry, all its names, and those of ``links`` (in the root directory) that point to it.

        Raises:
            StateError: Another process was faster.
            HostError: The disk refused.
        """
        with self.staging() as staging, StoreLock(self.root):
            for name, target in self._links():
                if target == digest:
                    os.unlink(os.path.join(self.root, "names", name))
            for link in links:
                if link_target(os.path.join(self.root, link)) == digest:
                    os.unlink(os.path.join(self.root, link))
            try:
                os.rename(self.directory(digest), os.path.join(staging.path, "removed"))
            except FileNotFoundError as error:
                raise StateError(f"{self.noun} {label} was removed by another process") from error
            except OSError as error:
                raise storage_error(error, f"cannot remove {self.noun} {label} from {self.root}") from error

    def point(self, link: str, digest: str) -> None:
        """Make ``link``, in the root directory, point to an entry."""
        with self.staging() as staging, StoreLock(self.root):
            _replace_link(digest, os.path.join(self.root, link), staging.path)

    def pointed(self, link: str) -> str:
        """Return the digest of the entry a link in the root directory points to; empty if there is none."""
        digest = link_target(os.path.join(self.root, link))
        return digest if digest and os.path.isdir(self.directory(digest)) else ""

    def _links(self) -> list[tuple[str, str]]:
        directory = os.path.join(self.root, "names")
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return []
        return [(name, link_target(os.path.join(directory, name))) for name in names]

    def _claim_name(self, name: str | None, base: str, digest: str, *, replace: bool) -> str:
        """Decide what a new entry is called; runs under the lock."""
        if name is not None:
            owner = self.named(name)
            if owner and owner != digest and not replace:
                raise ConfigError(
                    f"the name {name!r} belongs to another {self.noun} ({owner[:12]})",
                    hint=f"choose another name, pass --replace, or kvmlite {self.noun} rm {name}",
                )
            return name
        existing = self.names().get(digest, ())
        if existing:
            return existing[0]
        base = base if is_name(base) else f"{self.noun}-{digest[:12]}"
        candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, 1 << 16))
        return next(candidate for candidate in candidates if not self.named(candidate))

    def _install(self, draft: Draft, manifest: dict[str, Any], name: str) -> None:
        """Rename the draft to its place and name it; runs under the lock.

        An older entry of the same digest makes room, and is removed with what is left of the draft.
        """
        digest = str(manifest["digest"])
        target, older = self.directory(digest), os.path.join(draft.scratch, "older")
        names = os.path.join(self.root, "names")
        _write_manifest(draft.path, manifest)
        os.makedirs(names, exist_ok=True)
        try:
            if os.path.isdir(target):
                os.rename(target, older)
            os.rename(draft.path, target)
            sync_file(self.root)
            _replace_link(f"../{digest}", os.path.join(names, name), draft.scratch)
        except BaseException:  # undo, unless it has its name already: then it is complete
            if not os.path.exists(draft.path) and link_target(os.path.join(names, name)) != digest:
                os.rename(target, draft.path)
            if os.path.exists(older) and not os.path.exists(target):
                os.rename(older, target)
            raise


def is_name(text: str) -> bool:
    """Tell whether ``text`` has only characters that a name may have."""
    return text != "" and not set(text) - _NAME_CHARACTERS


def check_name(name: str, noun: str) -> None:
    """Raise ConfigError if ``name`` cannot be the name of a kernel, an image or a volume."""
    if not is_name(name) or len(name) > 128 or name[0] in ".-":
        raise ConfigError(
            f"{name!r} cannot name {'an' if noun[0] in 'aeiou' else 'a'} {noun}",
            hint="use letters, digits and . _ + ~ -, starting with a letter or digit",
        )


def link_target(path: str) -> str:
    """Return the digest that a link points to; empty if there is no link."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return ""


def now_text() -> str:
    """Return the time in UTC, ISO 8601 with microseconds."""
    import time

    now_us = time.time_ns() // 1000
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_us // 10**6)) + f".{now_us % 10**6:06}Z"


def digest_file(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"manifest.json has no {error}" if isinstance(error, KeyError) else f"manifest.json: {error}"


def _replace_link(target: str, path: str, scratch: str) -> None:
    draft = os.path.join(scratch, "link")
    os.symlink(target, draft)
    os.rename(draft, path)


def _write_manifest(directory: str, manifest: dict[str, Any]) -> None:
    """Write the manifest last, after everything it speaks of is on the disk."""
    import ctypes
    import json

    with open(os.path.join(directory, "manifest.json"), "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
        if ctypes.CDLL(None, use_errno=True).syncfs(file.fileno()) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), directory)
