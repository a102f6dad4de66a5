"""Where kvmlite keeps what it downloads and what it can make again."""

from __future__ import annotations

import os

__all__ = ["cache_home", "data_home", "runtime_home", "vmlinux_cache"]


def _xdg_directory(variable: str, fallback: str) -> str:
    """Return an XDG base directory; a relative value is ignored, as its specification says."""
    value = os.environ.get(variable, "")
    base = value if os.path.isabs(value) else os.path.join(os.path.expanduser("~"), fallback)
    return os.path.join(base, "kvmlite")


def data_home() -> str:
    """Return the directory of things worth keeping: kernels and tools.

    ``$KVMLITE_HOME``, else ``${XDG_DATA_HOME:-~/.local/share}/kvmlite``. It need not exist.
    """
    home = os.environ.get("KVMLITE_HOME", "")
    return os.path.abspath(home) if home else _xdg_directory("XDG_DATA_HOME", ".local/share")


def cache_home() -> str:
    """Return the directory of things that can be built again: unpacked kernels, initial RAM file systems, what was measured.

    ``$KVMLITE_HOME/cache``, else ``${XDG_CACHE_HOME:-~/.cache}/kvmlite``. It need not exist.
    """
    home = os.environ.get("KVMLITE_HOME", "")
    if home:
        return os.path.join(os.path.abspath(home), "cache")
    return _xdg_directory("XDG_CACHE_HOME", ".cache")


def vmlinux_cache() -> str:
    """Return the directory of unpacked kernels."""
    return os.path.join(cache_home(), "vmlinux")


def runtime_home() -> str:
    """Return the directory of notes on what runs now; gone after a reboot. It need not exist.

    ``$KVMLITE_HOME/run``; else, for root, ``/run/kvmlite``, the same in all sessions, as what root changes is the host's;
    else ``$XDG_RUNTIME_DIR/kvmlite``, or ``/tmp/kvmlite-UID`` where there is none.
    """
    home = os.environ.get("KVMLITE_HOME", "")
    if home:
        return os.path.join(os.path.abspath(home), "run")
    if os.geteuid() == 0:
        return "/run/kvmlite"
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    return os.path.join(base, "kvmlite") if os.path.isabs(base) else f"/tmp/kvmlite-{os.geteuid()}"
