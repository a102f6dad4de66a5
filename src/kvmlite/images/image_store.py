"""The image store: one directory per root file system, named by the digest of its data, and links that give it names.

::

    images/
      DIGEST/manifest.json  root.ext4
      names/ .lock .staging-PID-...    (see entries.py)
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError, ImageError
from kvmlite.host.copying import next_data
from kvmlite.images.entries import MIN_DIGEST_PREFIX, Draft, Entries, check_name, now_text
from kvmlite.images.image import Image, ImageConfig
from kvmlite.images.staging import Staging, storage_error
from kvmlite.paths import data_home

__all__ = ["ImageStore", "disk_in"]

_DISK = "root.ext4"


def disk_in(draft: Draft) -> str:
    """Return where the file system of a draft goes."""
    return os.path.join(draft.path, _DISK)


class ImageStore:
    """The images of this user.

    Args:
        root: Another directory than ``${XDG_DATA_HOME:-~/.local/share}/kvmlite/images``.

    Thread: any; any number of processes may use one store. Blocks on disk.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root or os.path.join(data_home(), "images")
        self.broken: list[str] = []
        self._entries = Entries(self.root, "image", format=1, remedy="kvmlite image import")

    def staging(self) -> Staging:
        """Return a working directory in the store, after removing those that dead processes left."""
        return self._entries.staging()

    def images(self) -> tuple[Image, ...]:
        """Return all images, oldest first. Damaged entries are left out and described in ``broken``."""
        found, self.broken = self._entries.load_all(self._load)
        return tuple(sorted(found, key=lambda image: (image.added, image.digest)))

    def find(self, text: str) -> Image:
        """Return the image with a name, or whose digest starts so.

        Raises:
            ConfigError: There is none, or more than one.
        """
        digest = self._entries.named(text)
        if digest:
            return self._load(digest, self._entries.names().get(digest, ()))
        prefix = text.lower() if len(text) >= MIN_DIGEST_PREFIX else "-"
        digests = [digest for digest in self._entries.digests() if digest.startswith(prefix)]
        if len(digests) > 1:
            choices = ", ".join(digest[:12] for digest in digests)
            raise ConfigError(f"image {text!r} is ambiguous: {choices}", hint="use one of these digests")
        if digests:
            return self._load(digests[0], self._entries.names().get(digests[0], ()))
        raise self._unknown(text)

    def check_free(self, name: str, *, replace: bool) -> None:
        """Raise ConfigError if ``name`` cannot be given to a new image: better before the work than after it."""
        check_name(name, "image")
        if self._entries.named(name) and not replace:
            raise ConfigError(
                f"there is an image {name!r} already",
                hint=f"choose another name, pass --replace, or kvmlite image rm {name}",
            )

    def publish(self, draft: Draft, *, source: str, config: ImageConfig, name: str, replace: bool = False) -> Image:
        """Move a finished draft into the store.

        Args:
            draft: Its file system is complete, and not written to any more.
            source: Where it came from.
            name: What to call it.
            replace: Take ``name`` away from another image.

        Raises:
            ConfigError: ``name`` is taken or cannot be one.
            HostError: The disk is full or not writable; nothing is left behind.
        """
        check_name(name, "image")
        try:
            disk = disk_in(draft)
            manifest = {
                "digest": _digest_data(disk),
                "size": os.stat(disk).st_size,
                "filesystem": "ext4",
                "source": source,
                "config": config.to_json(),
                "added": now_text(),
            }
            digest = self._entries.publish(draft, manifest, name=name, base=name, replace=replace)
        except HostError:
            raise
        except OSError as error:
            raise storage_error(error, f"cannot add the image to {self.root}") from error
        return self._load(digest, self._entries.names().get(digest, ()))

    def remove(self, image: Image) -> None:
        """Remove an image and all its names. A machine that runs it is not disturbed."""
        self._entries.remove(image.digest, image.name)

    def _load(self, digest: str, names: tuple[str, ...]) -> Image:
        manifest = self._entries.manifest(digest)
        path = os.path.join(self._entries.directory(digest), _DISK)
        try:
            size = int(manifest["size"])
            if os.stat(path).st_size != size:
                raise ImageError(f"image {path} is not {size} bytes long", hint=self._entries.remedy(digest))
            return Image(
                path=path,
                size=size,
                name=manifest["name"] if manifest["name"] in names or not names else names[0],
                digest=digest,
                source=str(manifest["source"]),
                names=names,
                added=str(manifest["added"]),
                config=ImageConfig.from_json(manifest["config"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._entries.damaged(digest, error) from error

    def _unknown(self, text: str) -> ConfigError:
        import difflib

        known = [name for names in self._entries.names().values() for name in names]
        close = difflib.get_close_matches(text, known, n=3)
        if close:
            return ConfigError(f"no image {text!r} in the store", hint=f"did you mean {' or '.join(close)}?")
        hint = "see kvmlite image ls" if known else "the store is empty: kvmlite image import NAME SOURCE"
        return ConfigError(f"no image {text!r} in the store", hint=hint)


def _digest_data(path: str) -> str:
    """Return a digest of a sparse file's size and of what is in it, holes left out."""
    import hashlib

    digest = hashlib.sha256(f"{os.stat(path).st_size}\n".encode())
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while (found := next_data(fd, offset)) is not None:
            start, offset = found
            digest.update(f"{start} {offset}\n".encode())
            while start < offset and (data := os.pread(fd, min(1 << 20, offset - start), start)):
                digest.update(data)
                start += len(data)
    finally:
        os.close(fd)
    return digest.hexdigest()
