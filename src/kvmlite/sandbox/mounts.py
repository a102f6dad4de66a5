"""Directories of the host in a Linux guest: mounted somewhere, or as its root."""

from __future__ import annotations

import os

from kvmlite.devices.fs import CACHE_MODES, SharedDirectory
from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.guest.agent import AgentClient
    from kvmlite.machine.config import DeviceSpec

MODES = ("ro", "rw", "overlay")

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_SCRATCH = "/run/kvmlite"  # in the guest: below it is what overlays are made of
_OF_THE_GUEST = ("dev", "proc", "run", "sys")  # a guest has its own


def _mount_overlay(agent: AgentClient, tag: str, target: str, source: str) -> None:
    """Mount a shared directory at ``target``, with a file system in the guest's memory above it for what is written."""
    place = f"{_SCRATCH}/{tag}"
    agent.mount(tag, f"{place}/lower", "virtiofs", flags=_MS_RDONLY, name=source)
    agent.mount("kvmlite", f"{place}/upper", "tmpfs", "mode=0755")
    for name in ("upper", "work"):
        agent.make_directory(f"{place}/upper/{name}")
    layers = f"lowerdir={place}/lower,upperdir={place}/upper/upper,workdir={place}/upper/work"
    agent.mount("kvmlite", target, "overlay", layers, name=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A directory of the host somewhere in the guest.

    Attributes:
        source: The directory.
        target: Absolute path in the guest; made if it is not there.
        mode: ``ro``: the host lets no write through. ``rw``: the guest's root may do below the directory what the user of
            this process may. ``overlay``: the guest writes to its own memory, which is gone at its end.
        cache: ``auto``, ``always`` or ``none``; see ``SharedDirectory``.
        xattr: Extended attributes.
    """

    source: str | os.PathLike[str]
    target: str
    mode: str = "ro"
    cache: str = "auto"
    xattr: bool = False

    def __post_init__(self) -> None:
        source = os.fspath(self.source)
        if self.mode not in MODES:
            raise ConfigError(f"unknown mode {self.mode!r} for a mount of {source}; choose {', '.join(MODES)}")
        if self.cache not in CACHE_MODES:
            raise ConfigError(f"unknown cache mode {self.cache!r}; choose one of {', '.join(CACHE_MODES)}")
        if not self.target.startswith("/") or "\x00" in self.target:
            raise ConfigError(
                f"{self.target!r}, where {source} is to be mounted, is no absolute path", hint="begin it with a slash"
            )

    @property
    def tag(self) -> str:
        """What the device calls it: another one for each mount of a guest."""
        import hashlib

        return "mount-" + hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def features(self) -> tuple[str, ...]:
        """What the guest's kernel needs."""
        return ("fs", "overlay") if self.mode == "overlay" else ("fs",)

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """One virtio-fs device."""
        spec = SharedDirectory(
            path=self.source,
            tag=self.tag,
            read_only=self.mode != "rw",
            cache=self.cache,
            xattr=self.xattr,
            submounts=self.mode != "overlay",
        )
        return (spec,)

    @property
    def needs_shared_memory(self) -> bool:
        """virtiofsd reads and writes guest memory."""
        return True

    def set_up(self, agent: AgentClient, windows: Sequence[int]) -> None:
        """Mount it in the guest."""
        source = os.fspath(self.source)
        if self.mode == "overlay":
            _mount_overlay(agent, self.tag, self.target, source)
        else:
            flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if self.mode == "ro" else 0)
            agent.mount(self.tag, self.target, "virtiofs", flags=flags, name=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRoot:
    """The host's own file system as the root of the guest: read-only on the host, what the guest writes is discarded.

    Attributes:
        path: Another directory to be the root, such as an unpacked distribution.
        cache: See ``SharedDirectory``.
    """

    path: str | os.PathLike[str] = "/"
    cache: str = "auto"

    tag = "kvmlite-root"
    features = ("fs", "overlay")
    needs_shared_memory = True

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """One virtio-fs device. The host's ``/proc``, ``/sys``, ``/dev`` and ``/run`` are kept from the guest."""
        return (SharedDirectory(path=self.path, tag=self.tag, read_only=True, cache=self.cache, hidden=_OF_THE_GUEST),)

    def set_up(self, agent: AgentClient, windows: Sequence[int]) -> None:
        """Put an overlay above it and make that the root."""
        root = f"{_SCRATCH}/root"
        _mount_overlay(agent, self.tag, root, os.fspath(self.path))
        agent.change_root(root)
        agent.mount("tmpfs", "/run", "tmpfs", "mode=0755", _MS_NOSUID | _MS_NODEV)
