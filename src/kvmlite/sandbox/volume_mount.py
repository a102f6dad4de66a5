"""A volume of the store, mounted somewhere in a Linux guest."""

from __future__ import annotations

import errno

from kvmlite.devices.blk import Disk
from kvmlite.errors import ConfigError
from kvmlite.guest.agent import GuestError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.guest.agent import AgentClient
    from kvmlite.images.volumes import Volume
    from kvmlite.machine.config import DeviceSpec

__all__ = ["VolumeMount", "open_volume"]

_MS_RDONLY = 1
_NO_FILE_SYSTEM = "no ext4 file system"
_FILE_SYSTEM_HINT = "kvmlite volume create --fs ext4 makes one with it; or give it to the guest as a --disk"
_EXT_MAGIC = (1024 + 0x38, b"\x53\xef")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMount:
    """A volume with an ext4 file system at a directory of the guest.

    Attributes:
        name, path, format: The volume and its file.
        target: Absolute path in the guest; made if it is not there.
        read_only: The guest cannot write; several may then use the volume at once.
    """

    name: str
    path: str
    format: str = "raw"
    target: str
    read_only: bool = False

    def __post_init__(self) -> None:
        if not self.target.startswith("/") or "\x00" in self.target:
            raise ConfigError(
                f"{self.target!r}, where volume {self.name} is to be mounted, is no absolute path",
                hint="begin it with a slash",
            )

    @property
    def features(self) -> tuple[str, ...]:
        """Modules for a disk and its file system."""
        return ("blk", "ext4")

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """The disk."""
        if self.format != "raw":
            from kvmlite.devices.vhost_user_blk import FormattedDisk

            return (FormattedDisk(path=self.path, format=self.format, read_only=self.read_only),)
        return (Disk(path=self.path, read_only=self.read_only),)

    @property
    def needs_shared_memory(self) -> bool:
        """Of another format than raw the disk is served by qemu-storage-daemon."""
        return self.format != "raw"

    def set_up(self, agent: AgentClient, windows: Sequence[int]) -> None:
        """Mount it.

        Raises:
            GuestError: The guest's kernel cannot mount it.
        """
        flags, data = (_MS_RDONLY, "noload") if self.read_only else (0, "")
        source, name = f"mmio:{windows[0]:x}", f"volume {self.name}"
        try:
            agent.mount(source, self.target, "ext4", data, flags=flags, name=name)
        except GuestError as error:
            if error.errno == errno.EINVAL:
                error.hint = f"there is {_NO_FILE_SYSTEM} in it; {_FILE_SYSTEM_HINT}"
            raise


def open_volume(name: str, target: str, *, read_only: bool = False) -> VolumeMount:
    """Return the mount of a volume of the store.

    Raises:
        ConfigError: There is no such volume, or it has no file system that can be mounted. In other formats than raw
            only the guest finds that out.
    """
    from kvmlite.images.volumes import VolumeStore

    volume = VolumeStore().find(name)
    if volume.format == "raw":
        _check_file_system(volume)
    return VolumeMount(name=name, path=volume.path, format=volume.format, target=target, read_only=read_only)


def _check_file_system(volume: Volume) -> None:
    offset, magic = _EXT_MAGIC
    with open(volume.path, "rb") as file:
        file.seek(offset)
        if file.read(len(magic)) != magic:
            raise ConfigError(f"volume {volume.name} has {_NO_FILE_SYSTEM}", hint=_FILE_SYSTEM_HINT)
