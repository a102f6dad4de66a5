"""The kernel store: one directory per kernel image, named by its digest, and links that give it names.

::

    kernels/
      DIGEST/manifest.json  vmlinuz | vmlinux  config  modules/lib/modules/RELEASE/...
      default -> DIGEST                (the kernel that ``run`` takes; else the cloud kernel added last)
      names/ .lock .staging-PID-...    (see entries.py)
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError, ImageError
from kvmlite.images.entries import MIN_DIGEST_PREFIX, Draft, Entries, check_name, digest_file, now_text
from kvmlite.images.kernel_file import Kernel
from kvmlite.images.staging import Staging, storage_error
from kvmlite.paths import data_home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["KernelStore", "image_in", "modules_in"]

_IMAGE_NAMES = ("vmlinuz", "vmlinux")


def image_in(draft: Draft) -> str:
    """Return the path of the kernel image, ``vmlinuz`` or ``vmlinux``, in a draft."""
    found = [name for name in _IMAGE_NAMES if os.path.isfile(os.path.join(draft.path, name))]
    if len(found) != 1:
        raise ValueError(f"a draft holds one kernel image, not {len(found)}")
    return os.path.join(draft.path, found[0])


def modules_in(draft: Draft, release: str) -> str:
    """Return where the modules of ``release`` go."""
    return os.path.join(draft.path, "modules", "lib", "modules", release)


class KernelStore:
    """The kernels of this user.

    Args:
        root: Another directory than ``${XDG_DATA_HOME:-~/.local/share}/kvmlite/kernels``.

    Thread: any; any number of processes may use one store. Blocks on disk.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root or os.path.join(data_home(), "kernels")
        self.broken: list[str] = []
        self._entries = Entries(self.root, "kernel", format=1, remedy="kvmlite kernel add")

    def staging(self) -> Staging:
        """Return a working directory in the store, after removing those that dead processes left."""
        return self._entries.staging()

    def kernels(self) -> tuple[Kernel, ...]:
        """Return all kernels, oldest first. Damaged entries are left out and described in ``broken``."""
        found, self.broken = self._entries.load_all(self._load)
        return tuple(sorted(found, key=lambda kernel: (kernel.added, kernel.digest)))

    def find(self, text: str) -> Kernel:
        """Return the kernel meant by a name, a release, a package name, or the start of a digest or release.

        Raises:
            ConfigError: There is none, or more than one.
        """
        digest = self._entries.named(text)
        if digest:
            return self._load(digest, self._entries.names().get(digest, ()))
        kernels = self.kernels()
        asked = [kernel for kernel in kernels if kernel.spec == text]
        if asked and not any(_is_named(kernel, text) for kernel in kernels):
            return asked[-1]  # the same metapackage, added again when it had a newer kernel
        for matches in (_is_named, _has_digest, _has_version):
            found = [kernel for kernel in kernels if matches(kernel, text)]
            if len(found) > 1:
                choices = ", ".join(f"{kernel.name} ({kernel.digest[:12]})" for kernel in found)
                raise ConfigError(f"kernel {text!r} is ambiguous: {choices}", hint="use one of these names or digests")
            if found:
                return found[0]
        raise _unknown(text, kernels)

    def default(self) -> Kernel | None:
        """Return the kernel to run when none is named: the marked one, else the cloud kernel added last, else the last."""
        digest = self._entries.pointed("default")
        if digest:
            return self._load(digest, self._entries.names().get(digest, ()))
        kernels = self.kernels()
        clouds = [kernel for kernel in kernels if "cloud" in kernel.source or "cloud" in kernel.release]
        choices = clouds or list(kernels)
        return choices[-1] if choices else None

    def set_default(self, kernel: Kernel) -> None:
        """Mark the kernel to run when none is named."""
        try:
            self._entries.point("default", kernel.digest)
        except HostError:
            raise
        except OSError as error:
            raise storage_error(error, f"cannot mark the default kernel in {self.root}") from error

    def publish(
        self, draft: Draft, *, release: str, source: str, spec: str = "", name: str | None = None, replace: bool = False
    ) -> Kernel:
        """Move a finished draft into the store.

        The same image again is no error: names add up, and its modules, config and source are those of the draft.

        Args:
            draft: Complete, and not written to any more: ``vmlinuz`` or ``vmlinux``, ``config`` if there is one,
                ``modules/lib/modules/RELEASE`` if there are some.
            release: What the kernel calls itself.
            source: Where it came from.
            spec: What the user asked for (a metapackage, say); it can be found by this too.
            name: What to call it; the release (with a number if that is taken) if None.
            replace: Take ``name`` away from another kernel.

        Raises:
            ConfigError: ``name`` is taken or cannot be one.
            HostError: The disk is full or not writable; nothing is left behind.
        """
        if name is not None:
            check_name(name, "kernel")
            if name == "image":
                raise ConfigError("no kernel can be called 'image'", hint="--kernel image is the one in an image")
        try:
            manifest = _manifest(draft, release, source, spec)
            digest = self._entries.publish(draft, manifest, name=name, base=release, replace=replace)
        except HostError:
            raise
        except OSError as error:
            raise storage_error(error, f"cannot add the kernel to {self.root}") from error
        return self._load(digest, self._entries.names().get(digest, ()))

    def remove(self, kernel: Kernel) -> None:
        """Remove a kernel and all its names. A machine that runs it is not disturbed."""
        self._entries.remove(kernel.digest, kernel.name, links=("default",))

    def _load(self, digest: str, names: tuple[str, ...]) -> Kernel:
        directory = self._entries.directory(digest)
        manifest = self._entries.manifest(digest)
        try:
            path = os.path.join(directory, manifest["image"])
            release = str(manifest["version"])
            modules_dir = os.path.join(directory, "modules", "lib", "modules", release)
            config = os.path.join(directory, "config")
            if not os.path.isfile(path):
                raise ImageError(
                    f"kernel {directory} has lost its image {manifest['image']}", hint=self._entries.remedy(digest)
                )
            return Kernel(
                path=path,
                release=release,
                modules_dir=modules_dir if manifest["modules"] else None,
                config=config if "config" in manifest["files"] else None,
                name=manifest["name"] if manifest["name"] in names or not names else names[0],
                digest=digest,
                source=str(manifest["source"]),
                spec=str(manifest["spec"]),
                names=names,
                added=str(manifest["added"]),
            )
        except (KeyError, TypeError) as error:
            raise self._entries.damaged(digest, error) from error


def _is_named(kernel: Kernel, text: str) -> bool:
    package = kernel.source.partition(":")[2].partition("=")[0] if kernel.source.startswith("deb:") else ""
    return text in (kernel.release, kernel.digest) or (package != "" and text == package)


def _has_digest(kernel: Kernel, text: str) -> bool:
    return len(text) >= MIN_DIGEST_PREFIX and kernel.digest.startswith(text.lower())


def _has_version(kernel: Kernel, text: str) -> bool:
    """Tell whether a release starts with ``text`` and a new number follows: 6.1 is 6.1.0-56, not 6.12."""
    return kernel.release.startswith(text) and kernel.release[len(text) : len(text) + 1] in (".", "-", "+", "~")


def _unknown(text: str, kernels: Iterable[Kernel]) -> ConfigError:
    import difflib

    known = [name for kernel in kernels for name in (*kernel.names, kernel.release)]
    close = difflib.get_close_matches(text, dict.fromkeys(known), n=3)
    if close:
        return ConfigError(f"no kernel {text!r} in the store", hint=f"did you mean {' or '.join(close)}?")
    hint = "see kvmlite kernel ls" if known else "the store is empty: kvmlite kernel add"
    return ConfigError(f"no kernel {text!r} in the store", hint=hint)


def _manifest(draft: Draft, release: str, source: str, spec: str) -> dict[str, Any]:
    image = image_in(draft)
    files = {os.path.basename(image): digest_file(image)}
    config = os.path.join(draft.path, "config")
    if os.path.isfile(config):
        files["config"] = digest_file(config)
    modules_dir = modules_in(draft, release)
    return {
        "version": release,
        "arch": "x86_64",
        "source": source,
        "spec": spec,
        "image": os.path.basename(image),
        "digest": files[os.path.basename(image)],
        "files": files,
        "modules": _measure(modules_dir) if release and os.path.isdir(modules_dir) else None,
        "added": now_text(),
    }


def _measure(directory: str) -> dict[str, int]:
    """Count the files of a modules directory and their bytes."""
    count = size = 0
    for parent, _, files in os.walk(directory):
        for name in files:
            count += 1
            size += os.stat(os.path.join(parent, name)).st_size
    return {"files": count, "size": size}
