"""kvmlite: microVMs on KVM, as an ordinary library.

    print(kvmlite.run("uname -a").stdout)

``run`` is one command in a fresh guest, ``LinuxGuest`` a guest to keep, ``Machine`` any guest at all. What they are made
of is in ``kvmlite.lowlevel``, fakes for tests of devices are in ``kvmlite.testing``; all other modules are internal.

Names are imported when they are first used: a program that only boots a bare machine loads nothing else.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.devices.balloon import Balloon
    from kvmlite.devices.blk import Disk
    from kvmlite.devices.console import Console
    from kvmlite.devices.fs import SharedDirectory
    from kvmlite.devices.net import Net
    from kvmlite.devices.pmem import Pmem
    from kvmlite.devices.rng import Rng
    from kvmlite.devices.vhost_user_blk import FormattedDisk
    from kvmlite.devices.vsock import Vsock
    from kvmlite.errors import (
        BootError,
        ConfigError,
        HostError,
        ImageError,
        KvmError,
        KvmliteError,
        StateError,
        UnsupportedError,
    )
    from kvmlite.guest.execution import ExecFailed
    from kvmlite.machine.config import Kernel, MachineConfig
    from kvmlite.machine.machine import Machine
    from kvmlite.machine.outcome import (
        Exited,
        ExitReport,
        Hung,
        Lost,
        Panicked,
        PoweredOff,
        Reset,
        Stopped,
        TimedOut,
        TripleFault,
        VmmError,
    )
    from kvmlite.sandbox.linux_guest import GuestConfig, LinuxGuest
    from kvmlite.sandbox.mounts import HostRoot, Mount
    from kvmlite.sandbox.network import Network
    from kvmlite.sandbox.result import CommandFailed, Result
    from kvmlite.sandbox.run import run

_HOMES = {
    "kvmlite.devices.balloon": ("Balloon",),
    "kvmlite.devices.blk": ("Disk",),
    "kvmlite.devices.console": ("Console",),
    "kvmlite.devices.fs": ("SharedDirectory",),
    "kvmlite.devices.net": ("Net",),
    "kvmlite.devices.pmem": ("Pmem",),
    "kvmlite.devices.rng": ("Rng",),
    "kvmlite.devices.vsock": ("Vsock",),
    "kvmlite.devices.vhost_user_blk": ("FormattedDisk",),
    "kvmlite.errors": (
        "BootError", "ConfigError", "HostError", "ImageError", "KvmError", "KvmliteError", "StateError",
        "UnsupportedError",
    ),
    "kvmlite.guest.execution": ("ExecFailed",),
    "kvmlite.machine.config": ("Kernel", "MachineConfig"),
    "kvmlite.machine.machine": ("Machine",),
    "kvmlite.machine.outcome": (
        "ExitReport", "Exited", "Hung", "Lost", "Panicked", "PoweredOff", "Reset", "Stopped", "TimedOut",
        "TripleFault", "VmmError",
    ),
    "kvmlite.sandbox.linux_guest": ("GuestConfig", "LinuxGuest"),
    "kvmlite.sandbox.mounts": ("HostRoot", "Mount"),
    "kvmlite.sandbox.network": ("Network",),
    "kvmlite.sandbox.result": ("CommandFailed", "Result"),
    "kvmlite.sandbox.run": ("run",),
}  # fmt: skip

__all__ = [
    "Balloon", "BootError", "CommandFailed", "ConfigError", "Console", "Disk", "ExecFailed", "ExitReport", "Exited",
    "FormattedDisk", "GuestConfig",
    "HostError", "HostRoot", "Hung", "ImageError", "Kernel", "KvmError", "KvmliteError", "LinuxGuest", "Lost", "Machine",
    "MachineConfig", "Mount", "Net", "Network", "Panicked", "Pmem", "PoweredOff", "Reset", "Result", "Rng", "SharedDirectory", "StateError", "Stopped", "TimedOut",
    "TripleFault", "UnsupportedError", "VmmError", "Vsock", "run",
]  # fmt: skip


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            import importlib

            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'kvmlite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
