"""Devices whose queues the host's kernel serves: /dev/vhost-net, /dev/vhost-vsock.

The kernel takes kicks from the ioeventfd and signals the irqfd by itself; nothing here runs per request.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from kvmlite.abi import vhost as abi
from kvmlite.errors import HostError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

VHOST_NET = "/dev/vhost-net"
VHOST_VSOCK = "/dev/vhost-vsock"

_U64 = struct.Struct("<Q")
_MODULES = {VHOST_NET: "vhost_net", VHOST_VSOCK: "vhost_vsock"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostRing:
    """A queue as the kernel needs to know it.

    Attributes:
        size: Descriptors.
        desc_hva, avail_hva, used_hva: Addresses of its parts in this process.
        kick_fd: The driver's notifications.
        call_fd: Signalled when chains were used.
        error_fd: Signalled when the driver broke a rule; the kernel then leaves the queue alone.
    """

    size: int
    desc_hva: int
    avail_hva: int
    used_hva: int
    kick_fd: int
    call_fd: int
    error_fd: int


class Vhost:
    """A vhost device of the host's kernel, owned by this process; one kernel thread.

    Args:
        path: ``VHOST_NET`` or ``VHOST_VSOCK``.

    Raises:
        HostError: The host has none, or does not let us use it.

    Thread: any, one at a time.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            code = error.errno or 0
            missing = code in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
            hint = f"sudo modprobe {_MODULES[path]}" if missing else f"run as root, or allow it: sudo chmod 666 {path}"
            raise HostError(f"cannot open {path}: {os.strerror(code)}", code, hint=hint) from error
        try:
            self._request("VHOST_SET_OWNER", abi.VHOST_SET_OWNER)
        except BaseException:
            self.close()
            raise

    def features(self) -> int:
        """The features it can serve, as a mask."""
        return int(_U64.unpack(self._request("VHOST_GET_FEATURES", abi.VHOST_GET_FEATURES, bytes(8)))[0])

    def set_features(self, features: int) -> None:
        """Say what the driver accepted of ``features()``; before any ring is started."""
        self._request("VHOST_SET_FEATURES", abi.VHOST_SET_FEATURES, _U64.pack(features))

    def set_memory(self, regions: Iterable[tuple[int, int, int]]) -> None:
        """Say where guest RAM is: ``(gpa, size, hva)`` of each region, page-aligned."""
        parts = [abi.VHOST_MEMORY_REGION.pack(gpa, size, hva, 0) for gpa, size, hva in regions]
        self._request(
            "VHOST_SET_MEM_TABLE", abi.VHOST_SET_MEM_TABLE, abi.VHOST_MEMORY.pack(len(parts), 0) + b"".join(parts)
        )

    def set_ring(self, index: int, ring: VhostRing) -> None:
        """Set up a queue, empty so far; it is served once its device is started."""
        addresses = abi.VHOST_VRING_ADDR.pack(index, 0, ring.desc_hva, ring.used_hva, ring.avail_hva, 0)
        self._request("VHOST_SET_VRING_NUM", abi.VHOST_SET_VRING_NUM, abi.VHOST_VRING_STATE.pack(index, ring.size))
        self._request("VHOST_SET_VRING_BASE", abi.VHOST_SET_VRING_BASE, abi.VHOST_VRING_STATE.pack(index, 0))
        self._request("VHOST_SET_VRING_ADDR", abi.VHOST_SET_VRING_ADDR, addresses)
        self._set_file("VHOST_SET_VRING_KICK", abi.VHOST_SET_VRING_KICK, index, ring.kick_fd)
        self._set_file("VHOST_SET_VRING_CALL", abi.VHOST_SET_VRING_CALL, index, ring.call_fd)
        self._set_file("VHOST_SET_VRING_ERR", abi.VHOST_SET_VRING_ERR, index, ring.error_fd)

    def release_ring(self, index: int) -> int:
        """Let go of a queue's eventfds, once its device is stopped. Returns the next available index it had not taken."""
        for call, number in (
            ("VHOST_SET_VRING_KICK", abi.VHOST_SET_VRING_KICK),
            ("VHOST_SET_VRING_CALL", abi.VHOST_SET_VRING_CALL),
            ("VHOST_SET_VRING_ERR", abi.VHOST_SET_VRING_ERR),
        ):
            self._set_file(call, number, index, abi.VHOST_FILE_UNBIND)
        state = self._request("VHOST_GET_VRING_BASE", abi.VHOST_GET_VRING_BASE, abi.VHOST_VRING_STATE.pack(index, 0))
        return int(abi.VHOST_VRING_STATE.unpack(state)[1])

    def set_net_backend(self, index: int, fd: int) -> None:
        """Serve a queue of /dev/vhost-net from a TAP.

        With ``VHOST_FILE_UNBIND``: serve it no more; the kernel touches neither ring nor TAP when this returns.
        """
        self._set_file("VHOST_NET_SET_BACKEND", abi.VHOST_NET_SET_BACKEND, index, fd)

    def set_guest_cid(self, cid: int) -> None:
        """Say which address the guest of /dev/vhost-vsock has.

        Raises:
            HostError: EADDRINUSE if another guest has it.
        """
        self._request("VHOST_VSOCK_SET_GUEST_CID", abi.VHOST_VSOCK_SET_GUEST_CID, _U64.pack(cid))

    def set_vsock_running(self, is_running: bool) -> None:
        """Serve the queues of /dev/vhost-vsock, or not; then the kernel touches no ring when this returns."""
        self._request("VHOST_VSOCK_SET_RUNNING", abi.VHOST_VSOCK_SET_RUNNING, struct.pack("i", is_running))

    def close(self) -> None:
        """Stop all it does and give it back; twice is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _set_file(self, call: str, number: int, index: int, fd: int) -> None:
        self._request(call, number, abi.VHOST_VRING_FILE.pack(index, fd))

    def _request(self, call: str, number: int, argument: bytes = b"") -> bytes:
        buffer = bytearray(argument)
        try:
            fcntl.ioctl(self.fd, number, buffer or 0)
        except OSError as error:
            raise HostError(f"{self.path}: {call}: {error.strerror}", error.errno or 0) from error
        return bytes(buffer)
