"""TAP interfaces: made here, opened by name, or taken over as a descriptor. Frames come and go behind a virtio_net_hdr_v1.

An interface made here is not persistent: the kernel removes it, with its addresses, routes and place in a bridge, when
its last descriptor is closed, also if the process is killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from kvmlite.abi.tun import (
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    IFNAMSIZ,
    TUN_DEVICE,
    TUNGETIFF,
    TUNSETIFF,
    TUNSETVNETHDRSZ,
)
from kvmlite.errors import ConfigError, HostError

VNET_HEADER_SIZE = 12
_FLAGS = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
_IFREQ = struct.Struct("16sH22x")
_NEEDED = {IFF_TAP: "a TAP", IFF_NO_PI: "without packet information (IFF_NO_PI)"}
_NOBODY_MAKES_ONE = "run as root, or use --net user, which needs no rights"


class Tap:
    """An open TAP interface.

    Attributes:
        name: Of the interface.
        fds: One non-blocking descriptor per queue pair; the Tap's until ``close``.
    """

    __slots__ = ("fds", "name")

    def __init__(self, name: str, fds: tuple[int, ...]) -> None:
        self.name = name
        self.fds = fds

    def close(self) -> None:
        """Close the descriptors. Twice is harmless."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)


def make_tap(name: str, *, queue_pairs: int = 1) -> Tap:
    """Make an interface that lives as long as its descriptors. It is down and has no address.

    Raises:
        ConfigError: The name is none for an interface.
        HostError: /dev/net/tun is missing or closed to us, CAP_NET_ADMIN is missing, or the name is taken.
    """
    _check_name(name)
    if _exists(name):
        raise HostError(f"there is an interface {name} already", errno.EEXIST)
    flags = _FLAGS | (IFF_MULTI_QUEUE if queue_pairs > 1 else 0)
    return _attach(name, flags, queue_pairs, f"make a TAP interface: {_NOBODY_MAKES_ONE}")


def open_tap(name: str, *, queue_pairs: int = 1) -> Tap:
    """Open an existing interface: ours if we are its owner, or with CAP_NET_ADMIN.

    Raises:
        ConfigError: The name is none for an interface.
        HostError: There is no such TAP, somebody else's process has it open, it is not ours, or it was not made for
            several queues.
    """
    _check_name(name)
    make_it = f"make it: sudo ip tuntap add {name} mode tap user $USER{' multi_queue' if queue_pairs > 1 else ''}"
    if not _exists(name):
        raise HostError(f"there is no interface {name}", errno.ENODEV, hint=make_it)
    what = f"open {name}: it belongs to another user; {make_it} (or run as root)"
    if queue_pairs > 1:
        try:
            return _attach(name, _FLAGS | IFF_MULTI_QUEUE, queue_pairs, what)
        except HostError as error:
            if error.errno != errno.EINVAL:
                raise
            raise HostError(
                f"{name} was not made for several queues, or is no TAP", errno.EINVAL, hint=make_it
            ) from error
    try:
        return _attach(name, _FLAGS, 1, what)
    except HostError as error:
        if error.errno != errno.EINVAL:
            raise
    try:
        return _attach(name, _FLAGS | IFF_MULTI_QUEUE, 1, what)
    except HostError as error:
        if error.errno != errno.EINVAL:
            raise
        raise HostError(f"{name} is no TAP interface", errno.EINVAL, hint=make_it) from error


def adopt_tap(fd: int) -> Tap:
    """Use a descriptor of a TAP that somebody else opened. It is duplicated: the caller's stays the caller's.

    Its file is made non-blocking, and its header size set, for all that share it.

    Raises:
        HostError: It is closed, or no TAP descriptor, or one with packet information or without a virtio_net_hdr.
    """
    request = bytearray(IFNAMSIZ + 24)
    try:
        fcntl.ioctl(fd, TUNGETIFF, request)
    except OSError as error:
        raise HostError(f"descriptor {fd} is not one of a TAP interface: {error.strerror}", error.errno or 0) from error
    name, flags = _IFREQ.unpack(request)
    for flag, what in _NEEDED.items():
        if not flags & flag:
            raise HostError(f"descriptor {fd}: the interface has to be {what}", errno.EINVAL)
    if not flags & IFF_VNET_HDR:
        raise HostError(f"descriptor {fd}: the TAP was opened without IFF_VNET_HDR", errno.EINVAL)
    return _prepared(name.rstrip(b"\x00").decode(), (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0),))


def _check_name(name: str) -> None:
    if not name or len(os.fsencode(name)) >= IFNAMSIZ or "/" in name or "%" in name or any(c.isspace() for c in name):
        raise ConfigError(f"{name!r} is no name of an interface", hint=f"1 to {IFNAMSIZ - 1} characters, as in ip link")


def _exists(name: str) -> bool:
    import socket

    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _open_device() -> int:
    try:
        return os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "sudo modprobe tun" if error.errno in (errno.ENOENT, errno.ENODEV) else _NOBODY_MAKES_ONE
        raise HostError(f"cannot open {TUN_DEVICE}: {error.strerror}", error.errno or 0, hint=hint) from error


def _attach(name: str, flags: int, queue_pairs: int, what: str) -> Tap:
    fds: list[int] = []
    try:
        for _ in range(queue_pairs):
            fds.append(_open_device())
            try:
                fcntl.ioctl(fds[-1], TUNSETIFF, _IFREQ.pack(os.fsencode(name), flags))
            except OSError as error:
                raise _explain(name, error, what) from error
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return _prepared(name, tuple(fds))


def _prepared(name: str, fds: tuple[int, ...]) -> Tap:
    tap = Tap(name, fds)
    try:
        for fd in fds:
            os.set_blocking(fd, False)
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_SIZE))
    except OSError as error:
        tap.close()
        raise HostError(f"{name}: cannot set up the descriptor: {error.strerror}", error.errno or 0) from error
    return tap


def _explain(name: str, error: OSError, what: str) -> HostError:
    code = error.errno or 0
    if code == errno.EPERM:
        return HostError(f"not permitted to use the interface {name}", code, hint=f"to {what}")
    if code == errno.EBUSY:
        return HostError(f"{name} is in use by another process", code, hint="every guest needs a TAP of its own")
    return HostError(f"cannot attach to {name}: {error.strerror}", code)
