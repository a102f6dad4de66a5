"""Ports: a TAP interface, or a stream socket; and backends for those that somebody else has opened."""

from __future__ import annotations

import fcntl
import os
import struct

from kvmlite.abi.tun import (
    IFF_ATTACH_QUEUE,
    IFF_DETACH_QUEUE,
    TUN_F_CSUM,
    TUN_F_TSO4,
    TUN_F_TSO6,
    TUN_F_TSO_ECN,
    TUN_F_USO4,
    TUN_F_USO6,
    TUNSETOFFLOAD,
    TUNSETQUEUE,
)
from kvmlite.errors import ConfigError, HostError
from kvmlite.host.tap import adopt_tap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmlite.host.tap import Tap
    from kvmlite.virtio.device import DeviceResources

_IFREQ = struct.Struct("16xH22x")  # a name, which is not looked at, and flags
_TSO = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
_USO = TUN_F_USO4 | TUN_F_USO6


class TapPort:
    """A TAP interface.

    Args:
        tap: An open one, with a descriptor per queue pair; the port's from now on.
        mac, mtu, egress: See ``NetPort``.
        on_close: Called after the TAP is closed, to give back what is behind it.

    Raises:
        HostError: It is gone. It is closed then, but ``on_close`` is not called.
    """

    framing = "tap"

    def __init__(
        self,
        tap: Tap,
        *,
        mac: bytes | None = None,
        mtu: int | None = None,
        egress: Any = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.fds = tap.fds
        self.mac = mac
        self.mtu = mtu
        self.egress = egress
        self._tap = tap
        self._served = len(tap.fds)
        self._on_close = on_close
        try:
            self.offloads = _find_offloads(tap.fds[0])
        except OSError as error:
            tap.close()
            raise HostError(f"cannot use {tap.name}: {error.strerror}", error.errno or 0) from error

    def set_offloads(self, flags: int) -> None:
        """See ``NetPort``. They are the interface's, not those of one queue."""
        fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, flags)

    def set_queue_pairs(self, count: int) -> None:
        """See ``NetPort``: the kernel spreads flows over the queues that are attached."""
        for index, fd in enumerate(self.fds):
            if (index < count) != (index < self._served):
                fcntl.ioctl(fd, TUNSETQUEUE, _IFREQ.pack(IFF_ATTACH_QUEUE if index < count else IFF_DETACH_QUEUE))
        self._served = count

    def close(self) -> None:
        """Close the TAP, then what is behind it; twice is harmless."""
        self._tap.close()
        self.fds = ()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


def _find_offloads(fd: int) -> int:
    """What the kernel can hand over: UDP segmentation since Linux 6.2. Leaves all of it off."""
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, _TSO | _USO)
        found = _TSO | _USO
    except OSError:
        fcntl.ioctl(fd, TUNSETOFFLOAD, _TSO)
        found = _TSO
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    return found


class StreamPort:
    """A connected stream socket with frames behind their lengths: QEMU's stream netdev, passt's ``--fd``.

    Args:
        fd: The port's from now on, and made nonblocking.
        mac, mtu, egress, on_close: As for ``TapPort``.
        has_valid_sums: The peer makes the checksums itself: the guest need not check them.
    """

    framing = "stream"
    offloads = 0

    def __init__(
        self,
        fd: int,
        *,
        mac: bytes | None = None,
        mtu: int | None = None,
        egress: Any = None,
        on_close: Callable[[], None] | None = None,
        has_valid_sums: bool = False,
    ) -> None:
        os.set_blocking(fd, False)
        self.has_valid_sums = has_valid_sums
        self.fds: tuple[int, ...] = (fd,)
        self.mac = mac
        self.mtu = mtu
        self.egress = egress
        self._on_close = on_close

    def set_offloads(self, flags: int) -> None:
        """Nothing was offered."""

    def set_queue_pairs(self, count: int) -> None:
        """There is one."""

    def close(self) -> None:
        """Close the socket, then what is behind it; twice is harmless."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


class TapBackend:
    """A TAP interface that somebody else has opened.

    Args:
        fd: Stays the caller's; open until the device is made.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def open(self, resources: DeviceResources, queue_pairs: int) -> TapPort:
        """Use a duplicate."""
        _check_single(resources, queue_pairs)
        return TapPort(adopt_tap(self._fd))


class StreamBackend:
    """A connected stream socket.

    Args:
        fd: Stays the caller's; open until the device is made.
        mtu: Largest packet that its peer takes, in bytes, if that is not 1500.
    """

    def __init__(self, fd: int, *, mtu: int | None = None) -> None:
        self._fd = fd
        self._mtu = mtu

    def open(self, resources: DeviceResources, queue_pairs: int) -> StreamPort:
        """Use a duplicate."""
        _check_single(resources, queue_pairs)
        return StreamPort(fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 0), mtu=self._mtu)


def _check_single(resources: DeviceResources, queue_pairs: int) -> None:
    if queue_pairs != 1:
        raise ConfigError(f"{resources.name}: one descriptor carries one queue pair, not {queue_pairs}")
