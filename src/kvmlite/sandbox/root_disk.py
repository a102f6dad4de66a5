"""A guest's root file system from an image: what it writes is thrown away, or kept in a volume."""

from __future__ import annotations

import errno
import os
import time

from kvmlite.devices.blk import OVERLAY_DISCARD, Disk
from kvmlite.devices.pmem import Pmem
from kvmlite.errors import ConfigError
from kvmlite.guest.agent import GuestError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.guest.agent import AgentClient
    from kvmlite.images.disk_kernel import DiskKernel
    from kvmlite.images.image import Image, ImageConfig
    from kvmlite.machine.config import DeviceSpec

__all__ = ["OWN_KERNEL", "RootDisk", "open_root"]

OWN_KERNEL = "image"
"""What the kernel is called that an image holds itself."""

_SERIAL = "kvmlite-root"
_MOUNT_POINT = "/mnt"
_MS_NOATIME = 1024
_DEVICE_TIMEOUT_S = 10.0
_DEVICE_CHECK_S = 0.01
_UUID = (1024 + 0x68, 16)  # ext4: s_uuid in the superblock


@dataclass(frozen=True, slots=True, kw_only=True)
class RootDisk:
    """The disk that becomes the guest's root directory.

    Attributes:
        path: A raw file with an ext4 file system, or with partitions.
        partition: Number of the one that holds the root; 0 if it is the whole disk.
        keep: What the guest writes stays in the file; else it goes to a private copy that ends with the guest.
        digest: Of an image that never changes; else empty.
        dax: The guest gets it as memory rather than as a disk (virtio-pmem). No other such memory may come before it.
    """

    path: str
    partition: int = 0
    keep: bool = False
    digest: str = ""
    dax: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Modules for a disk and its file system."""
        return ("pmem" if self.dax else "blk", "ext4")

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """The disk."""
        if self.dax:
            return (Pmem(path=self.path, mode="shared" if self.keep else "private"),)
        return (Disk(path=self.path, overlay="" if self.keep else OVERLAY_DISCARD, serial=_SERIAL),)

    @property
    def needs_shared_memory(self) -> bool:
        """No: the disk is served from this process."""
        return False

    def set_up(self, agent: AgentClient, windows: Sequence[int]) -> None:
        """Mount it and make it the root.

        Raises:
            GuestError: The guest's kernel cannot mount it.
        """
        flags = 0 if self.keep else _MS_NOATIME
        if self.dax:
            _mount_memory(agent, f"/dev/pmem0p{self.partition}" if self.partition else "/dev/pmem0", flags)
        else:
            source = f"serial:{_SERIAL}:{self.partition}" if self.partition else f"serial:{_SERIAL}"
            agent.mount(source, _MOUNT_POINT, "ext4", flags=flags)
        agent.change_root(_MOUNT_POINT)

    def own_kernel(self) -> DiskKernel:
        """Return the kernel that the disk itself would boot; see ``images.disk_kernel.find_disk_kernel``."""
        from kvmlite.images.disk_kernel import find_disk_kernel

        return find_disk_kernel(self.path, self.digest)


def _mount_memory(agent: AgentClient, device: str, flags: int) -> None:
    """Linux makes the block device of a persistent memory some time after it has found the memory."""
    deadline = time.monotonic() + _DEVICE_TIMEOUT_S
    while True:
        try:
            agent.mount(device, _MOUNT_POINT, "ext4", "dax", flags)
        except GuestError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO) or time.monotonic() >= deadline:
                raise
            time.sleep(_DEVICE_CHECK_S)
        else:
            return


def open_root(name: str, *, keep: str = "", dax: bool = False) -> tuple[RootDisk, ImageConfig]:
    """Return the root disk for an image, and how the image wants to be run.

    Args:
        name: The image's name in the store, the beginning of its digest, or (with a slash) the path of a raw disk image.
        keep: A volume to keep what is written in. It is made of the image if there is none of this name; one that was made
            of this image before is gone on with.
        dax: Give it to the guest as memory rather than as a disk.

    Raises:
        ConfigError: There is no such image, or the volume was made of something else.
        ImageError: The file is no disk image.
        UnsupportedError: There is no ext file system in it that could be a root.
        HostError: The volume cannot be made.
    """
    from kvmlite.images.image_store import ImageStore

    if "/" in name:
        return _root_of_file(name, keep, dax)
    image = ImageStore().find(name)
    if not keep:
        return RootDisk(path=image.path, digest=image.digest, dax=dax), image.config
    return RootDisk(path=_volume_of(image, keep), keep=True, dax=dax), image.config


def _root_of_file(path: str, keep: str, dax: bool) -> tuple[RootDisk, ImageConfig]:
    from kvmlite.images.disk_kernel import find_root_partition
    from kvmlite.images.image import ImageConfig

    if os.path.isdir(path):
        raise ConfigError(
            f"{path} is a directory, not a disk image",
            hint="--root boots into a directory; kvmlite image import makes an image of it",
        )
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such disk image")
    if keep:
        raise ConfigError(f"{path} is not in the store: nothing can be kept of it", hint="write to it as a --disk")
    return RootDisk(path=path, partition=find_root_partition(path), dax=dax), ImageConfig()


def _volume_of(image: Image, name: str) -> str:
    """A volume made of an image has the image's UUID."""
    from kvmlite.images.volumes import VolumeStore

    store = VolumeStore()
    if not store.has(name):
        return store.create_from(name, image.path).path
    volume = store.find(name)
    if volume.format != "raw":
        raise ConfigError(
            f"volume {name} is {volume.format}; what an image is to keep is kept in a raw one",
            hint=f"choose another name for --keep, or kvmlite volume convert {name} raw",
        )
    if _read_uuid(volume.path) != _read_uuid(image.path):
        raise ConfigError(
            f"volume {name} was not made of image {image.name}",
            hint=f"choose another name for --keep, or kvmlite volume rm {name}",
        )
    return volume.path


def _read_uuid(path: str) -> bytes:
    offset, size = _UUID
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
