"""virtio-blk: disks. The spec is here; the device loads when a machine has one."""

from __future__ import annotations

from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.devices.blk.device import VirtioBlk
    from kvmlite.virtio.device import DeviceResources

MAX_QUEUES = 16
OVERLAY_DISCARD = "discard"
_SERIAL_LIMIT = 20
_ENGINES = ("auto", "sync", "io_uring")
_MAX_BURST_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk: a raw image file or a block device of the host.

    A disk that is written to belongs to one machine at a time; one that is only read, or has an overlay, may be shared.

    Attributes:
        path: The image or device.
        read_only: The guest cannot write; the file is opened for reading alone.
        overlay: ``discard``: the guest can write, but to a private copy that ends with the machine; the file is opened
            for reading alone. Empty: what it writes is in the image.
        direct: Go past the host's page cache.
        serial: How the guest can tell it from others (``/dev/disk/by-id/virtio-SERIAL``): at most 20 ASCII characters.
        queues: Request queues, each with a thread of its own.
        engine: ``sync``: one request at a time in each queue; ``io_uring``: many, where that is quicker; ``auto``: the
            latter where the host has it.
        bandwidth: Bytes a second it may read and write in all; 0 is unlimited.
        iops: Requests a second it may do; 0 is unlimited.
        burst_s: How many seconds' worth of both it may do at once after a rest.
    """

    path: str
    read_only: bool = False
    overlay: str = ""
    direct: bool = False
    serial: str = ""
    queues: int = 1
    engine: str = "auto"
    bandwidth: int = 0
    iops: int = 0
    burst_s: float = 1.0

    def __post_init__(self) -> None:
        if not str(self.path) or "\x00" in str(self.path):
            raise ConfigError(f"disk: path {str(self.path)!r} cannot be a file's")
        if self.overlay not in ("", OVERLAY_DISCARD):
            raise ConfigError(
                f"disk: overlay {self.overlay!r} is unknown", hint=f"there is {OVERLAY_DISCARD!r}, or none"
            )
        if self.overlay and self.read_only:
            raise ConfigError("disk: a read-only disk needs no overlay", hint="ask for one of the two")
        if self.overlay and self.direct:
            raise ConfigError(
                "disk: an overlay is never made durable, so direct I/O means nothing", hint="ask for one of the two"
            )
        if not self.serial.isascii() or not self.serial.isprintable() or len(self.serial) > _SERIAL_LIMIT:
            raise ConfigError(f"disk: serial {self.serial!r} is not up to {_SERIAL_LIMIT} printable ASCII characters")
        if not 1 <= self.queues <= MAX_QUEUES:
            raise ConfigError(f"disk: {self.queues} queues, allowed are 1 to {MAX_QUEUES}")

        if self.engine not in _ENGINES:
            raise ConfigError(f"disk: engine {self.engine!r} is unknown", hint=f"there are: {', '.join(_ENGINES)}")
        if self.overlay and self.engine == "io_uring":
            raise ConfigError("disk: an overlay is served by the sync engine alone", hint="leave engine out")
        if self.bandwidth < 0 or self.iops < 0 or not 0 < self.burst_s <= _MAX_BURST_S:
            raise ConfigError(
                f"disk: limits of {self.bandwidth} bytes/s and {self.iops} requests/s with bursts of {self.burst_s} s",
                hint=f"limits are positive, or 0 for none; a burst is above 0, up to {_MAX_BURST_S} s",
            )

    @property
    def keeps_writes(self) -> bool:
        """What the guest writes outlasts the machine."""
        return not self.read_only and not self.overlay

    def attach(self, resources: DeviceResources) -> VirtioBlk:
        """Open and lock the image, and make the device.

        Raises:
            HostError: It cannot be opened, or another machine uses it.
            ImageError: It is no disk image.
        """
        from kvmlite.devices.blk.backing import Backing
        from kvmlite.devices.blk.device import VirtioBlk

        backing = Backing(self)
        try:
            return VirtioBlk(self, backing, resources)
        except BaseException:
            backing.close()
            raise
