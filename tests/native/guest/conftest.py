"""The agent program, run on this machine as an ordinary process over a socket pair: as shipped, and under sanitizers."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.sanitized import build_program

from kvmlite.guest import build_agent, protocol
from kvmlite.guest.agent import AgentClient, ExecHandle
from kvmlite.host.loop import DeviceLoop

PATH = "/usr/local/bin:/usr/bin:/bin"
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.fixture(scope="session")
def shipped_program() -> Path:
    """The agent as it is packaged, built anew if a source has changed."""
    return build_agent.build()


@pytest.fixture(scope="session")
def sanitized_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent with AddressSanitizer and UndefinedBehaviorSanitizer; any finding ends it with status 99."""
    program = tmp_path_factory.mktemp("agent") / "kvmlite-agent-sanitized"
    build_program(program, ["gcc", *build_agent.STRICT, "-O1", *SANITIZERS], sorted(build_agent.SOURCES.glob("*.c")))
    return program


@pytest.fixture(params=["shipped", "sanitized"])
def program(request: pytest.FixtureRequest) -> Path:
    """Both builds, one after the other."""
    path: Path = request.getfixturevalue(f"{request.param}_program")
    return path


class AgentProcess:
    """A running agent and our end of its channel."""

    def __init__(self, program: Path, log: Path) -> None:
        self.stream, theirs = socket.socketpair()
        self.stream.settimeout(60)
        self.log = log
        sanitizers = {"ASAN_OPTIONS": "exitcode=99:detect_leaks=1", "UBSAN_OPTIONS": "exitcode=99"}
        with theirs, open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [str(program), "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**sanitizers, "CANARY": "of the agent"},
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )

    def finish(self) -> int:
        """Wait for its end; the channel has been closed."""
        status = self.process.wait(60)
        text = self.log.read_text(errors="replace")
        assert "Sanitizer" not in text, text
        assert "runtime error" not in text, text
        return status


@pytest.fixture
def agent_process(program: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent to speak raw frames to; it has to end by itself, and cleanly, when its channel closes."""
    agent = AgentProcess(program, tmp_path / "agent.log")
    yield agent
    agent.stream.close()
    assert agent.finish() in (0, -9)


class RawPeer:
    """A host that sends what it likes."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._reader = protocol.FrameReader()
        self._frames: list[tuple[int, int, int, bytes]] = []

    def send(self, data: bytes) -> None:
        self._stream.sendall(data)

    def next_frame(self) -> tuple[int, int, int, bytes] | None:
        """The agent's next frame; None once it has closed the channel."""
        while not self._frames:
            try:
                count = self._stream.recv_into(self._reader.space())
            except ConnectionResetError:  # it closed without having read all we sent
                return None
            if not count:
                return None
            self._reader.received(count)
            self._frames += [(k, f, n, bytes(p)) for k, f, n, p in self._reader.frames()]
        return self._frames.pop(0)

    def rest(self) -> list[tuple[int, int, int, bytes]]:
        """All frames until the agent closes the channel."""
        frames = []
        while frame := self.next_frame():
            frames.append(frame)
        return frames


@pytest.fixture
def peer(agent_process: AgentProcess) -> RawPeer:
    """The channel as raw frames; the agent's HELLO is taken, ours not sent."""
    raw = RawPeer(agent_process.stream)
    frame = raw.next_frame()
    assert frame is not None
    assert frame[0] == protocol.HELLO
    return raw


@pytest.fixture
def client(agent_process: AgentProcess, loop: DeviceLoop) -> Iterator[AgentClient]:
    """A client of a running agent."""
    agent_client = AgentClient(os.dup(agent_process.stream.fileno()), loop)
    agent_process.stream.close()
    yield agent_client
    agent_client.close()


@pytest.fixture
def run(client: AgentClient) -> Callable[..., ExecHandle]:
    """Run a command to its end."""

    def run_to_end(*argv: str, **options: Any) -> ExecHandle:
        options.setdefault("env", {"PATH": PATH})
        handle = client.exec(argv, **options)
        handle.wait(60)
        return handle

    return run_to_end
