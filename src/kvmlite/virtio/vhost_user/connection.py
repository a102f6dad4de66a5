"""Messages to a vhost-user back end and its replies. A back end parses what a hostile guest wrote, so it is not trusted."""

from __future__ import annotations

import os
import socket
import time

from kvmlite.abi import vhost_user as abi
from kvmlite.abi.vhost_user import Request
from kvmlite.errors import HostError

MAX_REPLY = 4096
"""Bytes of a reply's payload that are accepted; none that is asked for is longer than a configuration space."""


class BackEndError(HostError):
    """The back end has gone, does not answer, refuses, or answers nonsense. The connection is of no further use."""


class BackEndGone(BackEndError):
    """The back end has closed the connection: most likely it has ended, and its last words say more."""


class Connection:
    """A connected stream socket to a back end.

    Args:
        sock: The socket; owned from now on.
        name: How messages call the back end.

    Thread: one at a time; blocks, never beyond ``deadline``.

    Attributes:
        deadline: On the monotonic clock: what is not finished by then is an error. Set before a series of messages.
        acknowledges: REPLY_ACK was negotiated: each message without a reply of its own asks for an acknowledgement.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._socket = sock
        self._name = name
        self.deadline = 0.0
        self.acknowledges = False

    def fileno(self) -> int:
        """The socket's descriptor; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; twice is harmless."""
        self._socket.close()

    def tell(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send a message that has no reply; wait for its acknowledgement if those were negotiated.

        Raises:
            BackEndError: See there.
        """
        flags = abi.VERSION | (abi.FLAG_NEED_REPLY if self.acknowledges else 0)
        self._send(request, flags, payload, fds)
        if self.acknowledges:
            status = self._receive_u64(request)
            if status:
                raise BackEndError(f"{self._name} refuses {request.name} (status {status})")

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        """Send a message, return the payload of its reply; descriptors that came along are closed.

        Raises:
            BackEndError: See there.
        """
        reply, fds = self.ask_fds(request, payload)
        for fd in fds:
            os.close(fd)
        return reply

    def ask_u64(self, request: Request) -> int:
        """Send a message whose reply is a number."""
        self._send(request, abi.VERSION, b"", ())
        return self._receive_u64(request)

    def ask_fds(self, request: Request, payload: bytes) -> tuple[bytes, list[int]]:
        """Send a message, return the payload of its reply and its descriptors, which are the caller's."""
        self._send(request, abi.VERSION, payload, ())
        return self._receive(request)

    def _receive_u64(self, request: Request) -> int:
        reply, fds = self._receive(request)
        for fd in fds:
            os.close(fd)
        if len(reply) != abi.U64.size:
            raise BackEndError(f"{self._name} answers {request.name} with {len(reply)} bytes, expected are 8")
        return int(abi.U64.unpack(reply)[0])

    def _time_left(self, doing: str) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise BackEndError(f"{self._name} did not {doing} in time")
        return left

    def _send(self, request: Request, flags: int, payload: bytes, fds: tuple[int, ...]) -> None:
        data = abi.HEADER.pack(request, flags, len(payload)) + payload
        try:
            self._socket.settimeout(self._time_left(f"take {request.name}"))
            sent = socket.send_fds(self._socket, [data], fds) if fds else self._socket.send(data)
            while sent < len(data):
                self._socket.settimeout(self._time_left(f"take {request.name}"))
                sent += self._socket.send(data[sent:])
        except TimeoutError as error:
            raise BackEndError(f"{self._name} did not take {request.name} in time") from error
        except OSError as error:
            raise self._lost(request, error) from error

    def _receive(self, request: Request) -> tuple[bytes, list[int]]:
        fds: list[int] = []
        try:
            header = self._receive_exactly(request, abi.HEADER.size, fds)
            answered, flags, size = abi.HEADER.unpack(header)
            if answered != request or flags & abi.VERSION_MASK != abi.VERSION or not flags & abi.FLAG_REPLY:
                raise BackEndError(f"{self._name} answers {request.name} with message {answered} (flags {flags:#x})")
            if size > MAX_REPLY:
                raise BackEndError(f"{self._name} answers {request.name} with {size} bytes, allowed are {MAX_REPLY}")
            return self._receive_exactly(request, size, fds), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _receive_exactly(self, request: Request, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                self._socket.settimeout(self._time_left(f"answer {request.name}"))
                part, new_fds, _, _ = socket.recv_fds(
                    self._socket, size - len(data), abi.MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError as error:
                raise BackEndError(f"{self._name} did not answer {request.name} in time") from error
            except OSError as error:
                raise self._lost(request, error) from error
            fds += new_fds
            if not part:
                raise BackEndGone(f"{self._name} closed the connection instead of answering {request.name}")
            data += part
        return data

    def _lost(self, request: Request, error: OSError) -> BackEndError:
        return BackEndGone(
            f"the connection to {self._name} broke at {request.name}: {error.strerror}", error.errno or 0
        )
