r"""The Unix socket through which host programs reach the guest.

A program connects and sends ``CONNECT <port>\n``; once the guest has accepted it reads ``OK <host port>\n``,
and what follows is the stream. Anything else, and a refusal, closes the socket. (The convention of Firecracker
and Cloud Hypervisor; their clients work.)
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import time
from functools import partial
from typing import TYPE_CHECKING

from kvmlite.abi.virtio_vsock import VMADDR_PORT_ANY
from kvmlite.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.devices.vsock.clock import Clock
    from kvmlite.devices.vsock.endpoint import Poller

GREETING_TIMEOUT_S = 2.0
MAX_GREETINGS = 64  # clients that have connected and not said where to; more wait in the backlog
_LINE_LIMIT = 32  # bytes of a CONNECT line with its newline
_CONNECT_LINE = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n")


class UnixListener:
    """Listens at a path and turns clients into connection requests.

    Owns the listening socket, its file, and clients until their request is handed on.

    Args:
        path: Where to listen. A file that a dead process left is replaced.
        poller: Watches the sockets.
        clock: Ends clients that say nothing.

    Raises:
        ConfigError: A live socket or another kind of file is at the path.
        HostError: The host refuses the socket.

    Thread: made and closed by the owner; all else the device loop.
    """

    def __init__(self, path: str, poller: Poller, clock: Clock) -> None:
        self._path = path
        self._poller = poller
        self._clock = clock
        self._on_request: Callable[[int, socket.socket], None] | None = None
        self._greetings: dict[socket.socket, tuple[bytearray, float]] = {}
        self._is_accepting = False
        self._listener = _bind(path)
        status = os.stat(path)
        self._identity = status.st_dev, status.st_ino

    def start(self, on_request: Callable[[int, socket.socket], None]) -> None:
        """Accept clients; each that says ``CONNECT`` is handed on as (guest port, nonblocking socket)."""
        self._on_request = on_request
        self._accept_more()

    def stop(self) -> None:
        """Accept no more; clients that wait in the backlog stay there for the next ``start``."""
        self._on_request = None
        self._pause()
        for client in list(self._greetings):
            self._forget(client).close()

    def close(self) -> None:
        """Close all sockets, and remove the file if it is still ours. Twice is harmless."""
        if self._listener.fileno() < 0:
            return
        self.stop()
        self._listener.close()
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return
        if (status.st_dev, status.st_ino) == self._identity:
            os.unlink(self._path)

    def _accept_more(self) -> None:
        if self._on_request is not None and not self._is_accepting:
            self._is_accepting = True
            self._poller.add_reader(self._listener.fileno(), self._accept)

    def _pause(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            self._poller.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        while len(self._greetings) < MAX_GREETINGS:
            try:
                client = self._listener.accept()[0]
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError:  # EMFILE, ENOMEM: try again at the next tick
                break
            client.setblocking(False)
            self._greetings[client] = bytearray(), time.monotonic() + GREETING_TIMEOUT_S
            self._poller.add_reader(client.fileno(), partial(self._greet, client))
            self._clock.add(self.expire)
        self._pause()
        self._clock.add(self.expire)

    def _greet(self, client: socket.socket) -> None:
        if client not in self._greetings:
            return
        line = self._greetings[client][0]
        try:
            # What follows the line is the stream: look first, then take the line only.
            seen = client.recv(_LINE_LIMIT - len(line), socket.MSG_PEEK)
            end = seen.find(b"\n") + 1
            line += client.recv(end or len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError:  # ECONNRESET
            seen = b""
        if seen and not end and len(line) < _LINE_LIMIT:
            return
        self._forget(client)
        self._accept_more()
        self._hand_on(client, bytes(line))

    def _hand_on(self, client: socket.socket, line: bytes) -> None:
        match = _CONNECT_LINE.fullmatch(line)
        port = int(match[1]) if match else VMADDR_PORT_ANY
        if port >= VMADDR_PORT_ANY or self._on_request is None:
            client.close()
        else:
            self._on_request(port, client)

    def _forget(self, client: socket.socket) -> socket.socket:
        self._poller.remove_reader(client.fileno())
        del self._greetings[client]
        return client

    def expire(self, now: float) -> bool:
        """Close clients that have not said where to in time; whether others still may be late.

        Args:
            now: ``time.monotonic()``.
        """
        for client, (_, deadline) in list(self._greetings.items()):
            if deadline <= now:
                self._forget(client).close()
        self._accept_more()
        return bool(self._greetings)


def _bind(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            listener.bind(path)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if isinstance(error, ConfigError | HostError):
            raise
        raise HostError(
            f"vsock: cannot listen at {path}: {error.strerror}",
            error.errno or 0,
            hint="choose a path in a directory that exists and that you may write to",
        ) from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens at."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(f"vsock: {path} exists and is not a socket", hint="choose another uds_path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # a full backlog: very much alive
            pass
    raise ConfigError(
        f"vsock: another process listens at {path}",
        hint="stop that VM, or choose another uds_path",
    )
