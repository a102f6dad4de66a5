"""Network namespaces for tests: what is done to interfaces, rules and settings in one goes away with it. They need root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvmlite._native import ffi, lib
from kvmlite.host.network.link import OpenLink
from kvmlite.host.tap import VNET_HEADER_SIZE, make_tap

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
TIMEOUT_S = 60.0
GUEST_MAC = "52:54:00:12:34:56"
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*arguments: str) -> str:
    """Run ip(8) in this thread's namespace."""
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    return done.stdout


class Namespace:
    """A new network namespace, with a thread that is in it. A context manager.

    Threads and processes that functions start there are in it, too; a socket stays in the one it was made in.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="namespace")
        self.call(self._enter)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    @staticmethod
    def _enter() -> None:
        if _libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        ip("link", "set", "lo", "up")

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the namespace; its result, or its exception."""
        return self._thread.submit(function, *arguments).result(TIMEOUT_S)

    def ip(self, *arguments: str) -> str:
        """Run ip(8) in it."""
        return self.call(ip, *arguments)

    def thread_id(self) -> int:
        """Of the thread, for ``ip link ... netns``."""
        return self.call(threading.get_native_id)


def in_network_namespace(function: Callable[[], T]) -> T:
    """Run one function in a namespace of its own."""
    with Namespace() as namespace:
        return namespace.call(function)


@contextlib.contextmanager
def connected(here: Namespace, there: Namespace, address: str, other: str) -> Iterator[None]:
    """A cable between two namespaces, with an address of a /24 at each end."""
    here.ip("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(there.thread_id()))
    for namespace, mine in ((here, address), (there, other)):
        namespace.ip("addr", "add", f"{mine}/24", "dev", "cable")
        namespace.ip("link", "set", "cable", "up")
    yield


class LinkGuest(Namespace):
    """A namespace that plays the guest behind a link: an interface eth0 whose frames go the way of a guest's.

    A thread carries them, as a device would, and asks the egress rules about each.
    """

    def __init__(self, link: OpenLink) -> None:
        super().__init__()
        self._link = link
        self._tap = self.call(make_tap, "eth0")
        self._fd = link.tap.fds[0] if link.tap is not None else link.stream.fileno()
        self._is_done = False
        self.refused = 0
        self._buffer = b""
        self._carrier = threading.Thread(target=self._carry, name="carrier")
        self._carrier.start()
        self.ip("link", "set", "eth0", "address", GUEST_MAC)
        self.ip("addr", "add", link.guest.address, "dev", "eth0")
        self.ip("link", "set", "eth0", "up", *(["mtu", str(link.mtu)] if link.mtu else []))
        for network in ("0.0.0.0/0",) if link.guest.reachable is None else link.guest.reachable:
            self.ip("route", "replace", network, "via", link.guest.gateway)

    def __exit__(self, *_: object) -> None:
        self._is_done = True
        self._carrier.join()
        self._tap.close()
        super().__exit__()

    def _carry(self) -> None:
        mine = self._tap.fds[0]
        with select.epoll() as epoll:
            epoll.register(mine, select.EPOLLIN)
            epoll.register(self._fd, select.EPOLLIN)
            while not self._is_done:
                for fd, _ in epoll.poll(0.02):
                    if fd == mine:
                        self._send(os.read(mine, 70000))
                    else:
                        self._receive(epoll)

    def _send(self, packet: bytes) -> None:
        header, frame = packet[:VNET_HEADER_SIZE], packet[VNET_HEADER_SIZE:]
        if self._link.egress is not None and not lib.kvl_egress_allows(self._link.egress, ffi.NULL, frame, len(frame)):
            self.refused += 1
        elif self._link.stream is not None:
            os.write(self._fd, len(frame).to_bytes(4, "big") + frame)
        else:
            os.write(self._fd, header + frame)

    def _receive(self, epoll: select.epoll) -> None:
        data = os.read(self._fd, 70000)
        if self._link.stream is None:
            os.write(self._tap.fds[0], data)
            return
        if not data:
            epoll.unregister(self._fd)
        self._buffer += data
        while len(self._buffer) >= 4 and len(self._buffer) >= 4 + (size := int.from_bytes(self._buffer[:4], "big")):
            os.write(self._tap.fds[0], bytes(VNET_HEADER_SIZE) + self._buffer[4 : 4 + size])
            self._buffer = self._buffer[4 + size :]
