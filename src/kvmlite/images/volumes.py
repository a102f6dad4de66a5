"""Volumes: disks with a name, kept from one run to the next.

::

    volumes/
      NAME.FORMAT                      (raw, qcow2, vmdk, vdi or vhdx; one format per name)
      .lock .staging-PID-...           (see staging.py)

The format is in the file's name and is told to every program that opens it: it is never guessed from what the guest has
written. A volume in use is locked by whoever uses it (host.disk.lock_image; QEMU's programs do the like).
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError, ImageError, StateError
from kvmlite.host.copying import copy_sparse
from kvmlite.host.disk import is_locked, lock_image
from kvmlite.images.entries import check_name
from kvmlite.images.ext4 import add_journal, make_empty
from kvmlite.images.staging import Staging, StoreLock, storage_error, sweep, sync_file
from kvmlite.images.tool import run_tool, tool_failure
from kvmlite.paths import data_home
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FORMATS", "Volume", "VolumeStore"]

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
_QEMU_HINT = "apt-get install qemu-utils"
_RESIZABLE = ("raw", "qcow2")
_MIN_SIZE = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume.

    Attributes:
        path: Its file.
        format: One of ``FORMATS``.
        size: What a guest sees, bytes.
        allocated: What it takes on the disk, bytes.
        is_used: Some machine has it.
    """

    name: str
    path: str
    format: str
    size: int
    allocated: int
    is_used: bool


class VolumeStore:
    """The volumes of this user.

    Args:
        root: Another directory than ``${XDG_DATA_HOME:-~/.local/share}/kvmlite/volumes``.

    Thread: any; any number of processes may use one store. Blocks on disk.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root or os.path.join(data_home(), "volumes")

    def volumes(self) -> tuple[Volume, ...]:
        """Return all volumes by name."""
        return tuple([_load(name, format, path) for name, (format, path) in sorted(self._files().items())])

    def find(self, name: str) -> Volume:
        """Return a volume.

        Raises:
            ConfigError: There is none of this name.
        """
        files = self._files()
        if name not in files:
            raise _unknown(name, tuple(files))
        return _load(name, *files[name])

    def has(self, name: str) -> bool:
        """Tell whether there is a volume of this name."""
        return name in self._files()

    def create(self, name: str, size: int, *, format: str = "raw", filesystem: str = "") -> Volume:
        """Make an empty volume; it takes no space until it is written to.

        Args:
            size: Bytes.
            filesystem: ``ext4`` to make one in it. Empty for none.

        Raises:
            ConfigError: The name is taken, or the request makes no sense.
            UnsupportedError: The program for it is missing.
            HostError: The disk refused.
        """
        _check_format(format)
        if size < _MIN_SIZE:
            raise ConfigError(f"a volume of {size} bytes is too small", hint="give a size with a unit: 10G")
        if filesystem not in ("", "ext4"):
            raise ConfigError(f"cannot make a file system {filesystem!r}", hint="choose ext4, or make it in the guest")

        def fill(path: str) -> None:
            if format != "raw" and not filesystem:
                _qemu_img("create", "-q", "-f", format, path, str(size))
                return
            raw = path if format == "raw" else f"{path}.raw"  # goes with the directory it is made in
            _make_sparse(raw, size)
            if filesystem:
                make_empty(raw)
            if raw != path:
                _qemu_img("convert", "-q", "-f", "raw", "-O", format, raw, path)

        return self._add(name, format, fill)

    def create_from(self, name: str, image: str) -> Volume:
        """Make a raw volume that is a copy of a raw file with an ext4 file system, and give that a journal.

        Blocks are shared with the original where the host's file system can do so, and holes stay holes.
        """

        def fill(path: str) -> None:
            copy_sparse(image, path)
            add_journal(path)

        return self._add(name, "raw", fill)

    def resize(self, name: str, size: int, *, shrink: bool = False) -> Volume:
        """Make a volume larger or, if asked to, smaller. A file system in it is not touched.

        Args:
            size: Bytes, in all.
            shrink: Cut off what lies behind ``size``: it is lost.

        Raises:
            ConfigError: It would become smaller and ``shrink`` is not given, or its format has a fixed size.
            HostError: A machine uses it, or the disk refused.
        """
        volume = self.find(name)
        if size < volume.size and not shrink:
            raise ConfigError(
                f"volume {name} has {volume.size} bytes, and {size} are fewer: what lies behind would be lost",
                hint="shrink the file system in it first, then pass --shrink",
            )
        if size < _MIN_SIZE:
            raise ConfigError(f"a volume of {size} bytes is too small", hint="give a size with a unit: 10G")
        if volume.format not in _RESIZABLE:
            raise ConfigError(
                f"the size of a {volume.format} volume is fixed", hint=f"kvmlite volume convert {name} qcow2"
            )
        if volume.format == "raw":
            with _Held(volume) as fd:
                _storage(lambda: os.truncate(fd, size), f"cannot resize volume {name}")
        else:
            with _Held(volume):
                pass  # qemu-img locks it itself
            extra = ("--shrink",) if size < volume.size else ()
            _qemu_img("resize", "-q", *extra, "-f", volume.format, volume.path, str(size))
        return self.find(name)

    def convert(self, name: str, format: str, *, target: str | None = None) -> Volume:
        """Bring a volume into another format: in its place, or as a new volume ``target``.

        Raises:
            ConfigError: ``target`` is taken, or the format is no other.
            HostError: A machine uses the volume, or the disk is full; nothing is left behind then.
        """
        _check_format(format)
        volume = self.find(name)
        if target is None and format == volume.format:
            raise ConfigError(f"volume {name} is {format} already")
        with _Held(volume):
            pass  # nobody writes to it; from here on qemu-img keeps writers out

        def fill(path: str) -> None:
            _qemu_img("convert", "-q", "-f", volume.format, "-O", format, volume.path, path)

        return self._add(target or name, format, fill, replaces="" if target else volume.path)

    def remove(self, name: str) -> None:
        """Remove a volume.

        Raises:
            HostError: A machine uses it.
        """
        volume = self.find(name)
        with StoreLock(self.root), _Held(volume):
            _storage(lambda: os.unlink(volume.path), f"cannot remove volume {name}")

    def _files(self) -> dict[str, tuple[str, str]]:
        """Format and path by name."""
        try:
            files = os.listdir(self.root)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise storage_error(error, f"cannot read the volumes in {self.root}") from error
        found = {}
        for file in files:
            name, _, format = file.rpartition(".")
            if format in FORMATS and not name.startswith("."):
                found[name] = (format, os.path.join(self.root, file))
        return found

    def _add(self, name: str, format: str, fill: Callable[[str], None], *, replaces: str = "") -> Volume:
        """Let ``fill`` make a file and give it its name; all or nothing."""
        check_name(name, "volume")
        self._check_free(name, replaces)
        sweep(self.root)
        with Staging(self.root) as staging:
            draft = os.path.join(staging.path, "volume")
            path = os.path.join(self.root, f"{name}.{format}")
            try:
                fill(draft)
                os.chmod(draft, 0o600)  # qemu-img leaves it to the umask
                sync_file(draft)
                with StoreLock(self.root):
                    self._check_free(name, replaces)
                    os.rename(draft, path)
                    if replaces:
                        os.unlink(replaces)
                    sync_file(self.root)
            except HostError:
                raise
            except OSError as error:
                raise storage_error(error, f"cannot make volume {name} in {self.root}") from error
        return self.find(name)

    def _check_free(self, name: str, replaces: str) -> None:
        taken = self._files().get(name)
        if taken is None or taken[1] == replaces:
            return
        raise ConfigError(
            f"there is a volume {name!r} already", hint=f"choose another name, or kvmlite volume rm {name}"
        )


class _Held:
    """A volume's file, open and locked against everybody else."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._fd = -1

    def __enter__(self) -> int:
        name, path = self._volume.name, self._volume.path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise StateError(f"volume {name} was removed by another process") from error
        except OSError as error:
            raise storage_error(error, f"cannot open volume {path}") from error
        try:
            lock_image(self._fd, path, writer=True)
        except BaseException as error:
            os.close(self._fd)
            if not isinstance(error, HostError):
                raise
            raise HostError(
                f"volume {name} is in use: a virtual machine has it", error.errno or 0, hint="end that machine first"
            ) from error
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _load(name: str, format: str, path: str) -> Volume:
    try:
        found = os.stat(path)
    except OSError as error:
        raise storage_error(error, f"cannot read volume {name}") from error
    return Volume(
        name=name,
        path=path,
        format=format,
        size=found.st_size if format == "raw" else _virtual_size(path, format),
        allocated=found.st_blocks * 512,
        is_used=_is_used(path),
    )


def _is_used(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return is_locked(fd)
    finally:
        os.close(fd)


def _virtual_size(path: str, format: str) -> int:
    import json

    text = _qemu_img("info", "--force-share", "--output=json", "-f", format, path)
    try:
        return int(json.loads(text)["virtual-size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(f"qemu-img does not tell the size of {path}") from error


def _qemu_img(*arguments: str) -> str:
    done = run_tool(["qemu-img", *arguments], hint=_QEMU_HINT)
    if done.returncode != 0:
        raise tool_failure(f"qemu-img {arguments[0]} failed", done, prefixes=("qemu-img:",))
    return done.stdout


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"unknown disk format {format!r}", hint=f"choose one of {', '.join(FORMATS)}")


def _make_sparse(path: str, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(fd, size)
    finally:
        os.close(fd)


def _storage(operation: Callable[[], None], doing: str) -> None:
    try:
        operation()
    except OSError as error:
        raise storage_error(error, doing) from error


def _unknown(name: str, known: tuple[str, ...]) -> ConfigError:
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return ConfigError(f"no volume {name!r}", hint=f"did you mean {' or '.join(close)}?")
    return ConfigError(
        f"no volume {name!r}", hint="see kvmlite volume ls" if known else "kvmlite volume create NAME SIZE makes one"
    )
