"""A fake agent at the other end of a socket pair, which sends what the test says."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from kvmlite.guest import protocol
from kvmlite.guest.agent import AgentClient, ChannelLost
from kvmlite.host.loop import DeviceLoop


class FakeAgent:
    """Speaks frames of its own choice to one client."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._reader = protocol.FrameReader()
        self._frames: list[tuple[int, int, int, bytes]] = []
        stream.settimeout(30)

    def send(self, kind: int, number: int = 0, payload: bytes = b"", flags: int = 0) -> None:
        self._stream.sendall(protocol.encode(kind, number, payload, flags))

    def send_raw(self, data: bytes) -> None:
        self._stream.sendall(data)

    def send_hello(self) -> None:
        head = protocol._HELLO.pack(b"KVLA", 1, 1, 1, 1000, 2000, 0)
        self.send(protocol.HELLO, 0, head + b"0.1.0\x006.1.0\x00")

    def send_words(self, kind: int, number: int, first: int, second: int) -> None:
        self.send(kind, number, first.to_bytes(4, "little") + second.to_bytes(4, "little"))

    def next_frame(self) -> tuple[int, int, int, bytes]:
        """The client's next frame: type, flags, id, payload."""
        while not self._frames:
            count = self._stream.recv_into(self._reader.space())
            assert count, "the client closed the channel"
            self._reader.received(count)
            self._frames += [(k, f, n, bytes(p)) for k, f, n, p in self._reader.frames()]
        return self._frames.pop(0)

    def expect(self, kind: int) -> tuple[int, bytes]:
        """The id and payload of the client's next frame, which is of this type."""
        frame = self.next_frame()
        assert frame[0] == kind
        return frame[2], frame[3]

    def close(self) -> None:
        self._stream.close()


@pytest.fixture
def silent_pair(loop: DeviceLoop) -> Iterator[tuple[FakeAgent, AgentClient]]:
    """An agent that has not said HELLO, and its client."""
    ours, theirs = socket.socketpair()
    agent = FakeAgent(theirs)
    client = AgentClient(ours.detach(), loop)
    yield agent, client
    client.close()
    agent.close()


@pytest.fixture
def pair(silent_pair: tuple[FakeAgent, AgentClient]) -> tuple[FakeAgent, AgentClient]:
    """An agent that has said HELLO and heard the client's."""
    agent, _ = silent_pair
    agent.send_hello()
    agent.expect(protocol.HELLO)
    return silent_pair


def wait_lost(client: AgentClient) -> ChannelLost:
    """The reason why the client gave its channel up, asked for with a request that nobody answers."""
    with pytest.raises(ChannelLost) as caught:
        client.ping(timeout_s=30)
    return caught.value


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Read end and write end of a pipe; a test may close them itself."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
