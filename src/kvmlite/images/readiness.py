"""What the host has to make guests of: kernels, and the tools that get and unpack them. For ``kvmlite doctor``."""

from __future__ import annotations

import os

from kvmlite.errors import KvmliteError
from kvmlite.host.finding import INFO, OK, WARN, Finding
from kvmlite.images.busybox import is_static
from kvmlite.images.kernels import resolve
from kvmlite.images.store import KernelStore
from kvmlite.paths import data_home

_APT_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")


def image_findings() -> list[Finding]:
    """All findings of this module, in the order they are shown. Downloads nothing."""
    return [kernels(), apt(), busybox(), zstd()]


def kernels() -> Finding:
    """How many kernels the store has, and which one ``run`` takes."""
    store = KernelStore()
    try:
        found = store.kernels()
        default = resolve(None)
    except KvmliteError as error:
        return Finding(
            id="kernels",
            status=WARN,
            seen=str(error),
            meaning="there is no kernel to run unless one is named",
            fix=error.hint or "kvmlite kernel add",
        )
    count = len(found)
    seen = f"{count} kernel{'' if count == 1 else 's'} in {store.root}"
    meaning = f"run takes {default.name} if none is named"
    if store.broken:
        return Finding(
            id="kernels",
            status=WARN,
            seen=f"{seen}, {len(store.broken)} damaged",
            meaning=meaning,
            fix=f"kvmlite kernel ls names them ({store.broken[0]})",
        )
    return Finding(id="kernels", status=OK, seen=seen, meaning=meaning)


def apt() -> Finding:
    """Whether kernels can be downloaded as Debian packages."""
    missing = [name for name in _APT_TOOLS if not _which(name)]
    if missing:
        return Finding(
            id="apt",
            status=INFO,
            seen=f"no {', '.join(missing)}",
            meaning="kernels cannot be downloaded as Debian packages",
            fix="give kvmlite kernel add a kernel file, a build tree or an unpacked package",
        )
    return Finding(
        id="apt", status=OK, seen=", ".join(_APT_TOOLS), meaning="kvmlite kernel add can download Debian's kernels"
    )


def busybox() -> Finding:
    """Whether there is a shell for guests: a static busybox."""
    stored = os.path.join(data_home(), "tools", "busybox")
    path = next((path for path in (*_on_path("busybox"), "/bin/busybox", stored) if is_static(path)), None)
    if path:
        return Finding(id="busybox", status=OK, seen=f"{path} is static", meaning="guests get a shell and small tools")
    if _which("apt-get"):
        return Finding(
            id="busybox",
            status=INFO,
            seen="no static busybox",
            meaning="it is downloaded when the first guest needs a shell",
            fix="sudo apt install busybox-static",
        )
    return Finding(
        id="busybox",
        status=WARN,
        seen="no static busybox",
        meaning="guests get no shell",
        fix="put a statically linked busybox into PATH",
    )


def zstd() -> Finding:
    """Whether kernels and modules packed with zstd can be unpacked."""
    from importlib.util import find_spec

    if find_spec("zstandard"):
        return Finding(
            id="zstd",
            status=OK,
            seen="Python package zstandard",
            meaning="kernels and modules packed with zstd can be used",
        )
    return Finding(
        id="zstd",
        status=INFO,
        seen="no Python package zstandard",
        meaning="modules packed with zstd cannot be used, kernels packed with it not be unpacked on the host",
        fix="pip install zstandard (Debian: python3-zstandard)",
    )


def _on_path(name: str) -> list[str]:
    return [os.path.join(directory, name) for directory in os.environ.get("PATH", "").split(":") if directory]


def _which(name: str) -> bool:
    return any(os.access(path, os.X_OK) for path in _on_path(name))
