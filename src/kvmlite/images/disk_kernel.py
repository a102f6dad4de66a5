"""The kernel that a disk image boots by itself, and where its root file system is: read out of it, no firmware, no mounting.

What is found is kept in the cache, below the digest of the image (or what tells one state of a file from another)::

    disk-kernels/KEY/found.json  boot/vmlinuz-RELEASE  boot/config-RELEASE  lib/modules/RELEASE/...
"""

from __future__ import annotations

import os

from kvmlite.errors import HostError, ImageError, UnsupportedError
from kvmlite.images.ext_files import ExtFiles, is_plain
from kvmlite.images.initramfs import file_signature
from kvmlite.images.kernel_file import identify
from kvmlite.images.loader_config import (
    LoaderEntry,
    choose_newest,
    parse_bls,
    parse_extlinux,
    parse_grub,
    version_key,
)
from kvmlite.images.modules import FEATURES, plan_modules, wanted_modules
from kvmlite.images.partitions import read_partitions
from kvmlite.images.staging import Staging, storage_error, sweep
from kvmlite.paths import cache_home
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.images.partitions import Partition

__all__ = ["DiskKernel", "find_disk_kernel", "find_root_partition"]

_GRUB = ("/grub/grub.cfg", "/grub2/grub.cfg")
_EXTLINUX = ("/extlinux/extlinux.conf", "/syslinux/syslinux.cfg", "/syslinux/extlinux.conf", "/extlinux.conf")
_INDEX_FILES = (
    "modules.dep", "modules.builtin", "modules.builtin.modinfo", "modules.softdep", "modules.alias", "modules.order",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskKernel:
    """A kernel read out of a disk.

    Attributes:
        directory: It and its modules, laid out like an unpacked package.
        arguments: What the loader's configuration gives it beside root, console and the like.
    """

    directory: str
    arguments: tuple[str, ...]


def find_root_partition(path: str) -> int:
    """Return the number of the partition that holds the root file system; 0 for the whole disk.

    Raises:
        ImageError: The image has no partition table that can be read.
        UnsupportedError: No ext file system in it looks like a root.
    """
    with _scratch() as staging:
        return _find_root(path, _open_all(path, staging.path), read_partitions(path)).number


def find_disk_kernel(path: str, digest: str = "") -> DiskKernel:
    """Return the kernel that the loader of a disk would boot by default, with its modules.

    Args:
        path: A raw image: partitions, or one ext file system.
        digest: Of an image that never changes; without, the file's times tell.

    Raises:
        ImageError: There is no kernel in it, or its modules are damaged.
        UnsupportedError: It has no ext file system, or this host has no debugfs.
        HostError: The disk is full.

    Thread: any. Blocks; the first time for seconds.
    """
    import hashlib

    key = digest or hashlib.sha256(repr(file_signature(os.path.abspath(path))).encode()).hexdigest()
    directory = os.path.join(_cache(), key)
    if not os.path.exists(os.path.join(directory, "found.json")):
        with _scratch() as staging:
            try:
                entry = os.path.join(staging.path, "entry")
                _extract(path, staging.path, entry)
                os.rename(entry, directory)
            except HostError:
                raise
            except OSError as error:
                if not os.path.exists(os.path.join(directory, "found.json")):  # else another process was faster
                    raise storage_error(error, f"cannot keep the kernel of {path} in {_cache()}") from error
    return DiskKernel(directory=directory, arguments=_read_arguments(directory))


def _cache() -> str:
    return os.path.join(cache_home(), "disk-kernels")


def _scratch() -> Staging:
    sweep(_cache())
    return Staging(_cache())


def _read_arguments(directory: str) -> tuple[str, ...]:
    import json

    try:
        with open(os.path.join(directory, "found.json"), "rb") as file:
            return tuple(map(str, json.load(file)["arguments"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageError(f"{directory} is damaged", hint=f"rm -r {directory}") from error


def _open_all(path: str, scratch: str) -> dict[int, ExtFiles]:
    found = {
        partition.number: ExtFiles(path, partition.offset, scratch)
        for partition in read_partitions(path)
        if partition.is_ext
    }
    if not found:
        raise UnsupportedError(
            f"{path} has no ext2, ext3 or ext4 file system", hint="other file systems cannot be read without mounting"
        )
    return found


def _find_root(path: str, systems: dict[int, ExtFiles], partitions: tuple[Partition, ...]) -> Partition:
    candidates = [partition for partition in partitions if partition.number in systems]
    marked = [partition for partition in candidates if partition.is_root]
    for partition in marked or candidates:
        if systems[partition.number].has_directory("/etc") or systems[partition.number].has_directory("/usr"):
            return partition
    raise UnsupportedError(f"no file system in {path} looks like a root: none has /etc or /usr")


def _extract(path: str, scratch: str, entry: str) -> None:
    """Copy kernel, config and modules into ``entry``, and write down the rest; found.json is written last."""
    import json

    systems = _open_all(path, scratch)
    root = systems[_find_root(path, systems, read_partitions(path)).number]
    files, found = _find_entry(path, systems)
    kernel = files.regular(found.kernel)
    if kernel is None:
        raise ImageError(f"{path}: its loader boots {found.kernel}, which is not there")
    image = os.path.join(entry, "boot/vmlinuz")
    files.copy([(kernel, image)])
    release = identify(image).release
    if not is_plain(release) or "/" in release:
        raise ImageError(f"{path}: kernel {found.kernel} does not tell its release")
    os.rename(image, f"{image}-{release}")
    config = files.regular(os.path.join(os.path.dirname(kernel), f"config-{release}"))
    if config is not None:
        files.copy([(config, os.path.join(entry, f"boot/config-{release}"))])
    _copy_modules(path, root, release, os.path.join(entry, "lib/modules", release))
    with open(os.path.join(entry, "found.json"), "w", encoding="utf-8") as file:
        json.dump({"kernel": found.kernel, "arguments": found.arguments}, file)


def _find_entry(path: str, systems: dict[int, ExtFiles]) -> tuple[ExtFiles, LoaderEntry]:
    """Ask each file system, which may be the root or /boot of its own; a loader's word counts more than a kernel lying there."""
    for look in (_configured, _newest_kernel):
        for files in systems.values():
            for place in ("/boot", ""):
                found = look(files, place)
                if found is None:
                    continue
                for kernel in (found.kernel, f"{place}{found.kernel}"):  # paths of a /boot that was its own partition
                    if files.regular(kernel) is not None:
                        return files, LoaderEntry(kernel=kernel, arguments=found.arguments)
    raise ImageError(
        f"{path} holds no kernel: no loader's configuration and no vmlinuz in /boot",
        hint="run it with a kernel of the store: kvmlite kernel ls",
    )


def _configured(files: ExtFiles, place: str) -> LoaderEntry | None:
    names = [name for name in files.names(f"{place}/loader/entries") if name.endswith(".conf")]
    entries = {name: parse_bls(files.read_text(f"{place}/loader/entries/{name}") or "") for name in names}
    found = choose_newest({name: entry for name, entry in entries.items() if entry is not None})
    if found is not None:
        return found
    for name in _GRUB:
        text = files.read_text(place + name)
        if text and (found := parse_grub(text)) is not None:
            return found
    for name in _EXTLINUX:
        text = files.read_text(place + name)
        if text and (found := parse_extlinux(text)) is not None:
            return found
    return None


def _newest_kernel(files: ExtFiles, place: str) -> LoaderEntry | None:
    names = [name for name in files.names(place or "/") if name.startswith("vmlinuz-")]
    names.sort(key=lambda name: ("rescue" not in name, version_key(name)))
    return LoaderEntry(kernel=f"/{names[-1]}", arguments=()) if names else None


def _copy_modules(path: str, root: ExtFiles, release: str, target: str) -> None:
    """Copy depmod's index files and those modules that a guest of ours may want."""
    source = f"/lib/modules/{release}"
    names = root.names(source)
    if not names:
        return  # all of it may be built in
    if "modules.dep" not in names:
        raise ImageError(f"{path}: {source} has no modules.dep", hint=f"run depmod {release} in it")
    root.copy([(f"{source}/{name}", os.path.join(target, name)) for name in _INDEX_FILES if name in names])
    plan = plan_modules(target, wanted_modules(tuple(FEATURES)))
    relative = [os.path.relpath(module.path, target) for module in plan.load]
    root.copy([(f"{source}/{name}", os.path.join(target, name)) for name in relative])
