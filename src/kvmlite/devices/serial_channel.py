"""A byte stream over a serial port: the guest agent's last resort on kernels without vsock and virtio-console."""

from __future__ import annotations

import os
import select
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.devices.serial import SerialPort
    from kvmlite.host.loop import DeviceLoop

_CHUNK = 4096
_PATIENCE_S = 0.5


class SerialChannel:
    """A socket pair between a serial port and whoever holds ``host_fd``.

    Thread: ``send`` where the port drains (one at a time); the rest on the device loop. Owns its end; ``take_host_fd``
    hands the other one out.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._ours = ours
        self._theirs: socket.socket | None = theirs
        self._given_up = False
        self._is_deaf = False
        self._port: SerialPort | None = None
        self._loop: DeviceLoop | None = None

    @property
    def fd(self) -> int:
        """Writable when the host has read; -1 once nobody is waited for."""
        return -1 if self._is_deaf else self._ours.fileno()

    def is_writable(self) -> bool:
        """Whether ``send`` would not have to wait."""
        return bool(select.select([], [self._ours], [], 0)[1])

    def attach(self, port: SerialPort, loop: DeviceLoop) -> None:
        """Type into ``port`` what the host sends."""
        self._port, self._loop = port, loop
        port.feed_from(self._ours.fileno())

    def take_host_fd(self) -> int:
        """The host's end, from now on the caller's."""
        assert self._theirs is not None, "taken once"
        fd = self._theirs.detach()
        self._theirs = None
        return fd

    def send(self, data: bytes) -> None:
        """Give the guest's output to the host; waits while the host is slow, drops it once the host has gone.

        After ``give_up`` it waits half a second at most: a machine can end, whoever holds the other end.
        """
        view = memoryview(data)
        while view and not self._is_deaf:
            try:
                view = view[os.write(self._ours.fileno(), view[:_CHUNK]) :]
            except BlockingIOError:
                has_room = select.select([], [self._ours], [], _PATIENCE_S)[1]
                self._is_deaf = self._given_up and not has_room
            except (BrokenPipeError, ConnectionResetError):
                return  # the client has hung up: whoever waits for its answer knows

    def give_up(self) -> None:
        """Do not wait any more for a host that does not read. Any thread."""
        self._given_up = True

    def hang_up(self) -> None:
        """The guest has ended: hand over what the port still holds, then let the host read the end. Any thread."""
        if self._port is not None:
            self._port.drain()
        try:
            self._ours.shutdown(socket.SHUT_WR)
        except OSError:  # closed already, or the host's end has gone
            return

    def close(self) -> None:
        """Close what has not been handed out."""
        self._ours.close()
        if self._theirs is not None:
            self._theirs.close()
