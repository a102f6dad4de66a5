"""virtio-blk on image formats that are not raw, served by qemu-storage-daemon (VIRTIO 1.2, 5.2)."""

from __future__ import annotations

import os
import stat

from kvmlite.errors import ConfigError, HostError, ImageError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

    from kvmlite.devices.vhost_user import VhostUserDevice
    from kvmlite.host.daemon import Daemon
    from kvmlite.virtio.device import DeviceResources
    from kvmlite.virtio.queue import DescriptorChain

FORMATS = ("qcow2", "vmdk", "vdi", "vhdx", "raw")

QUEUE_SIZE = 128
_MAX_QUEUES = 16
_FLUSH_TIMEOUT_S = 60.0  # at its end the daemon writes what of the image it holds in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class FormattedDisk:
    """A disk whose image has a format.

    An image that names other files (a backing file, an external data file, extents elsewhere) is refused: whoever made it
    would choose what of the host the guest may read.

    Attributes:
        path: The image.
        format: ``qcow2``, ``vmdk``, ``vdi``, ``vhdx`` or ``raw``; never guessed from what is in the file, which the guest may
            have written.
        read_only: The guest cannot write; the file is opened for reading alone.
        direct: Go past the host's page cache.
        queues: Request queues.
    """

    path: str | os.PathLike[str]
    format: str
    read_only: bool = False
    direct: bool = False
    queues: int = 1

    needs_shared_memory = True

    def __post_init__(self) -> None:
        path = os.fspath(self.path)
        if not path or "\x00" in path:
            raise ConfigError(f"disk: path {path!r} cannot be a file's")
        if self.format not in FORMATS:
            raise ConfigError(f"disk: format {self.format!r} is unknown", hint=f"there are: {', '.join(FORMATS)}")
        if not 1 <= self.queues <= _MAX_QUEUES:
            raise ConfigError(f"disk: {self.queues} queues, allowed are 1 to {_MAX_QUEUES}")

    @property
    def keeps_writes(self) -> bool:
        """What the guest writes outlasts the machine."""
        return not self.read_only

    def attach(self, resources: DeviceResources) -> VhostUserDevice:
        """Start qemu-storage-daemon and make the device.

        Raises:
            ConfigError: Guest memory cannot be shared.
            HostError: The image cannot be read, qemu-storage-daemon is not installed, or it refuses the image.
            ImageError: The image is not of the format, or refers to other files.
        """
        from kvmlite.abi import virtio_blk as abi
        from kvmlite.abi.virtio import VIRTIO_ID_BLOCK
        from kvmlite.devices.vhost_user import VhostUserDevice
        from kvmlite.virtio.vhost_user.session import check_memory

        check_memory(resources.memory, resources.name)
        path = os.path.abspath(self.path)
        is_device = _check(path, self.format)
        bits = (
            abi.VIRTIO_BLK_F_SEG_MAX, abi.VIRTIO_BLK_F_RO, abi.VIRTIO_BLK_F_BLK_SIZE, abi.VIRTIO_BLK_F_FLUSH,
            abi.VIRTIO_BLK_F_TOPOLOGY, abi.VIRTIO_BLK_F_MQ, abi.VIRTIO_BLK_F_DISCARD, abi.VIRTIO_BLK_F_WRITE_ZEROES,
        )  # fmt: skip
        return VhostUserDevice(
            resources,
            lambda: start_storage_daemon(self, path, is_device=is_device),
            device_id=VIRTIO_ID_BLOCK,
            queue_sizes=(QUEUE_SIZE,) * self.queues,
            features=sum(1 << bit for bit in bits),
            config=abi.VIRTIO_BLK_CONFIG.size,
            fail=fail_request,
            lost_with_it=""
            if self.read_only or self.format == "raw"
            else "writes that it had not stored yet are lost with it",
            in_order=False,
            end_timeout_s=_FLUSH_TIMEOUT_S,
        )


def _check(path: str, format: str) -> bool:
    """Look at the image; whether it is a block device."""
    from kvmlite.devices.image_references import check_references

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(f"cannot open disk image {path}: {error.strerror}", error.errno or 0) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageError(f"{path} is neither a file nor a block device")
        check_references(fd, path, format)
        return stat.S_ISBLK(mode)
    except OSError as error:
        raise HostError(f"cannot read disk image {path}: {error.strerror}", error.errno or 0) from error
    finally:
        os.close(fd)


def start_storage_daemon(spec: FormattedDisk, path: str, *, is_device: bool) -> tuple[Daemon, socket.socket]:
    """Start a qemu-storage-daemon that serves the image over a connection.

    Raises:
        HostError: It is not installed.
    """
    from kvmlite.host.daemon import Daemon
    from kvmlite.virtio.vhost_user.listener import connected_listener

    class StorageDaemon(Daemon):
        def last_words(self) -> str:
            """Its last message, which may have several lines, without its name and the options it quotes."""
            message = self.tail().rpartition("qemu-storage-daemon: ")[2].rpartition("}: ")[2]
            return "; ".join(line.strip() for line in message.splitlines() if line.strip())

    listener, client = connected_listener()
    try:
        with listener:
            argv = ["qemu-storage-daemon", *daemon_options(spec, path, listener.fileno(), is_device=is_device)]
            daemon = StorageDaemon(
                "qemu-storage-daemon", argv, pass_fds=(listener.fileno(),), package="qemu-utils"
            )  # fmt: skip
            return daemon, client
    except BaseException:
        client.close()
        raise


def daemon_options(spec: FormattedDisk, path: str, fd: int, *, is_device: bool) -> list[str]:
    """Return its options, as JSON: nothing in a path can be taken for an option."""
    import json

    common: dict[str, Any] = {"read-only": spec.read_only, "cache": {"direct": spec.direct}, "discard": "unmap"}
    file = {"driver": "host_device" if is_device else "file", "node-name": "file", "filename": path, **common}
    disk: dict[str, Any] = {"driver": spec.format, "node-name": "disk", "file": "file", **common}
    if spec.format in ("qcow2", "vmdk"):
        disk["backing"] = None
    export = {
        "type": "vhost-user-blk", "id": "export", "node-name": "disk", "writable": not spec.read_only,
        "addr": {"type": "fd", "str": str(fd)}, "num-queues": spec.queues,
    }  # fmt: skip
    return ["--blockdev", json.dumps(file), "--blockdev", json.dumps(disk), "--export", json.dumps(export)]


def fail_request(chain: DescriptorChain) -> int:
    """Answer a request with an I/O error: its status is the last byte the device may write."""
    from kvmlite.abi.virtio_blk import VIRTIO_BLK_S_IOERR

    if not chain.writable_size:
        return 0
    return chain.write(bytes((VIRTIO_BLK_S_IOERR,)), chain.writable_size - 1)
