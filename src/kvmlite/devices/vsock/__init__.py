"""virtio-vsock: sockets between guest and host. The spec is here; the device loads when a machine has one."""

from __future__ import annotations

from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.devices.vsock.device import VirtioVsock
    from kvmlite.devices.vsock.vhost import VhostVsock
    from kvmlite.virtio.device import DeviceResources

_FIRST_CID = 3  # 0 and 1 are reserved, 2 is the host
_LAST_CID = 0xFFFFFFFE  # 0xffffffff is VMADDR_CID_ANY
BACKENDS = ("user", "vhost")
_PATH_LIMIT = 107 - len("_4294967295")  # sockaddr_un, less the port that a guest's connections add


@dataclass(frozen=True, slots=True, kw_only=True)
class Vsock:
    """A socket device.

    Attributes:
        cid: The guest's context ID (address). None: 3, or with ``vhost`` one that is free on this host.
        uds_path: Unix socket for host programs: ``CONNECT <port>`` reaches the guest; what the guest connects to
            reaches ``<uds_path>_<port>``. None: only this process talks to the guest.
        backend: ``user``: served here, the guest's address is its own business. ``vhost``: by the host's kernel; programs on
            the host use AF_VSOCK, and all of them can reach the guest.
    """

    cid: int | None = None
    uds_path: str | None = None
    backend: str = "user"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"vsock: unknown backend {self.backend!r}; choose one of {', '.join(BACKENDS)}")
        if self.backend == "vhost" and self.uds_path is not None:
            raise ConfigError(
                "vsock: uds_path means nothing with backend 'vhost'",
                hint="programs on the host reach the guest by AF_VSOCK sockets",
            )
        if self.cid is not None and not _FIRST_CID <= self.cid <= _LAST_CID:
            raise ConfigError(
                f"vsock: cid {self.cid} is not in {_FIRST_CID}..{_LAST_CID}",
                hint="0 to 2 are reserved (2 is the host); 3 is the usual choice",
            )
        if self.uds_path is not None and not 0 < len(str(self.uds_path).encode()) <= _PATH_LIMIT:
            raise ConfigError(
                f"vsock: uds_path is {len(str(self.uds_path).encode())} bytes long, allowed are 1 to {_PATH_LIMIT}",
                hint="use a shorter directory, such as one in /tmp or /run",
            )

    def attach(self, resources: DeviceResources) -> VirtioVsock | VhostVsock:
        """Make the device.

        Raises:
            ConfigError: Somebody else listens at ``uds_path``.
            HostError: The host refuses to listen there; it has no vhost-vsock; another guest has the ``cid``.
        """
        if self.backend == "vhost":
            from kvmlite.devices.vsock.vhost import VhostVsock

            return VhostVsock(resources, self.cid)
        from kvmlite.devices.vsock.device import VirtioVsock

        path = None if self.uds_path is None else str(self.uds_path)
        return VirtioVsock(guest_cid=self.cid or _FIRST_CID, loop=resources.loop, uds_path=path, name=resources.name)
