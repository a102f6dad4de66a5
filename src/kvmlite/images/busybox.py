"""The guest's shell and small tools: one static busybox from the host, and the names it answers to."""

from __future__ import annotations

import os
import struct

from kvmlite.errors import HostError, ImageError, UnsupportedError
from kvmlite.paths import data_home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["applets", "find_busybox", "is_static"]

_PT_INTERP = 3
_MAX_APPLETS = 4096
_HINT = "apt install busybox-static"


def find_busybox(*, progress: Callable[[str], None] | None = None) -> str:
    """Return the path of a statically linked busybox.

    The host's own if it is static, else the one of Debian's package ``busybox-static``, which is downloaded
    into the store once (nothing is installed).

    Args:
        progress: Called with a line of text before a download.

    Raises:
        UnsupportedError: There is none, and no apt to get it with.
        HostError: The download failed.
    """
    stored = os.path.join(data_home(), "tools", "busybox")
    directories = [path for path in os.environ.get("PATH", "").split(":") if path]
    for path in (*[os.path.join(directory, "busybox") for directory in directories], "/bin/busybox", stored):
        if is_static(path):
            return path
    from kvmlite.images.debian import fetch_file

    try:
        fetch_file("busybox-static", ("bin/busybox", "usr/bin/busybox"), stored, progress=progress)
    except UnsupportedError as error:
        raise UnsupportedError("no statically linked busybox on this host", hint=_HINT) from error
    if not is_static(stored):
        raise ImageError(f"{stored} is not a statically linked x86-64 program", hint=_HINT)
    return stored


def is_static(path: str) -> bool:
    """Tell whether ``path`` is an x86-64 program that needs no loader (no PT_INTERP) and may be run."""
    if not os.access(path, os.R_OK | os.X_OK) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(4096)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", head, 18)[0] != 62:
        return False
    (offset,) = struct.unpack_from("<Q", head, 32)
    entry_size, count = struct.unpack_from("<HH", head, 54)
    if entry_size != 56 or not count or offset + entry_size * count > len(head):
        return False
    kinds = [struct.unpack_from("<I", head, offset + index * entry_size)[0] for index in range(count)]
    return _PT_INTERP not in kinds


def applets(path: str) -> tuple[str, ...]:
    """Ask a busybox which programs it can be, as paths relative to the root (``bin/sh``), sorted.

    Raises:
        HostError: It cannot be run.
        ImageError: It answers with something else than paths.
    """
    import subprocess

    try:
        done = subprocess.run(
            ["busybox", "--list-full"],
            executable=path,
            capture_output=True,
            check=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise HostError(f"cannot run {path}: {error.strerror}", error.errno or 0, hint=_HINT) from error
    except subprocess.SubprocessError as error:
        raise HostError(f"{path} --list-full failed: {error}", hint=_HINT) from error
    names = done.stdout.decode("ascii", "replace").split()
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
            raise ImageError(f"{path} --list-full names {name!r}, which is no path of a program", hint=_HINT)
    if not names or len(names) > _MAX_APPLETS:
        raise ImageError(f"{path} --list-full names {len(names)} programs; expected 1 to {_MAX_APPLETS}", hint=_HINT)
    return tuple(sorted(set(names)))
