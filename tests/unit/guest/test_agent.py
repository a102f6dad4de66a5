"""The client against an agent that does as the test says, well or badly."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlite.errors import ConfigError, HostError, StateError
from kvmlite.guest import protocol
from kvmlite.guest.agent import AgentClient, Capture, ChannelLost, ExecFailed, GuestError
from kvmlite.guest.execution import OUTPUT_WINDOW
from kvmlite.host.loop import DeviceLoop

from .conftest import FakeAgent, wait_lost

Pair = tuple[FakeAgent, AgentClient]


def started(agent: FakeAgent, pid: int = 9, stdin_window: int = 0) -> int:
    """Take EXEC and answer STARTED; the id."""
    number, _ = agent.expect(protocol.EXEC)
    agent.send_words(protocol.STARTED, number, pid, stdin_window)
    return number


def ended(agent: FakeAgent, number: int, code: int = 0) -> None:
    """Send EXIT and the end of both streams."""
    agent.send_words(protocol.EXIT, number, protocol.EXIT_CODE, code)
    agent.send(protocol.STDOUT, number, b"", protocol.FLAG_EOF)
    agent.send(protocol.STDERR, number, b"", protocol.FLAG_EOF)


def test_hello_arrives(pair: Pair) -> None:
    hello = pair[1].hello(timeout_s=30)
    assert (hello.kernel_release, hello.channel) == ("6.1.0", "vsock")


def test_nothing_is_sent_before_the_agent_has_spoken(silent_pair: Pair) -> None:
    agent, client = silent_pair
    handle = client.exec(["true"])
    agent._stream.settimeout(0.02)
    with pytest.raises(TimeoutError):
        agent.next_frame()
    agent._stream.settimeout(30)
    agent.send_hello()
    agent.expect(protocol.HELLO)
    ended(agent, started(agent), 3)
    assert handle.wait(30) == 3


def test_hello_of_a_silent_agent_times_out(silent_pair: Pair) -> None:
    with pytest.raises(TimeoutError, match="no word from the guest agent"):
        silent_pair[1].hello(timeout_s=0.01)


def test_output_and_exit_code_are_delivered(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cmd"])
    number = started(agent, pid=77)
    agent.send(protocol.STDOUT, number, b"out")
    agent.send(protocol.STDERR, number, b"err")
    ended(agent, number, 7)
    assert (handle.wait(30), handle.stdout, handle.stderr, handle.pid, handle.term_signal) == (7, b"out", b"err", 77, 0)


def test_exit_code_is_known_before_the_output_has_ended(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cmd"])
    number = started(agent)
    agent.send_words(protocol.EXIT, number, protocol.EXIT_SIGNAL, 9)
    client_saw_exit(client, agent)
    assert (handle.exit_code, handle.term_signal, handle.is_finished) == (137, 9, False)
    agent.send(protocol.STDOUT, number, b"late", protocol.FLAG_EOF)
    agent.send(protocol.STDERR, number, b"", protocol.FLAG_EOF)
    assert (handle.wait(30), handle.stdout) == (137, b"late")


def client_saw_exit(client: AgentClient, agent: FakeAgent) -> None:
    """Make sure that everything the agent has sent was taken: a ping comes after it."""
    answering = threading.Thread(target=lambda: agent.send(protocol.PONG, agent.expect(protocol.PING)[0], bytes(8)))
    answering.start()
    assert client.ping(timeout_s=30) == 0
    answering.join()


@pytest.mark.parametrize(
    ("stage", "error", "name", "exit_code", "text"),
    [
        (protocol.STAGE_EXEC, 2, "exec", 127, "cmd: No such file or directory"),
        (protocol.STAGE_EXEC, 13, "exec", 126, "cmd: Permission denied"),
        (protocol.STAGE_EXEC, 8, "exec", 126, "cmd: Exec format error"),
        (protocol.STAGE_USER, 2, "user", 125, "user 'joe': no such user or group in the guest"),
        (protocol.STAGE_CWD, 2, "cwd", 125, "directory '/nope': No such file or directory"),
    ],
)
def test_failed_start_says_what_failed(
    pair: Pair, stage: int, error: int, name: str, exit_code: int, text: str
) -> None:
    agent, client = pair
    handle = client.exec(["cmd"], user="joe", cwd="/nope")
    number, _ = agent.expect(protocol.EXEC)
    agent.send_words(protocol.EXEC_FAILED, number, stage, error)
    with pytest.raises(ExecFailed) as caught:
        handle.wait(30)
    assert (caught.value.stage, caught.value.errno, caught.value.exit_code) == (name, error, exit_code)
    assert str(caught.value) == text


def test_end_of_the_channel_loses_commands_and_requests(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cmd"])
    number = started(agent)
    agent.send(protocol.STDOUT, number, b"so far")
    agent.close()
    with pytest.raises(ChannelLost, match="closed the channel"):
        handle.wait(30)
    assert (handle.stdout, handle.exit_code) == (b"so far", None)
    with pytest.raises(ChannelLost):
        client.exec(["another"])


def test_lost_is_told_once(loop: DeviceLoop) -> None:
    import socket

    ours, theirs = socket.socketpair()
    told: list[str] = []
    client = AgentClient(ours.detach(), loop, on_lost=lambda reason: told.append(str(reason)))
    theirs.close()
    with pytest.raises(ChannelLost):
        client.hello(30)
    client.close()
    assert told == ["the agent closed the channel"]


def test_a_waiter_that_closes_the_client_at_once_does_not_keep_lost_from_being_told(loop: DeviceLoop) -> None:
    ours, theirs = socket.socketpair()
    told: list[str] = []
    client = AgentClient(ours.detach(), loop, on_lost=lambda reason: told.append(str(reason)))
    client._hello_came.set = client.close  # type: ignore[method-assign]  # as soon as a waiter could
    theirs.close()
    loop.call(lambda: None)
    while client.lost is None:
        loop.call(lambda: None)
    assert told == ["the agent closed the channel"]


def test_credit_is_returned_in_quarters_of_the_window(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cmd"], stdout=None)
    number = started(agent)
    for _ in range(5):
        agent.send(protocol.STDOUT, number, bytes(60000))
    assert agent.expect(protocol.WINDOW) == (number, b"\x01\0\0\0" + (300000).to_bytes(4, "little"))
    ended(agent, number)
    assert handle.wait(30) == 0


def test_output_beyond_the_window_is_a_protocol_error(pair: Pair, pipe: tuple[int, int]) -> None:
    agent, client = pair
    handle = client.exec(["cmd"], stdout=pipe[1])  # nobody reads the pipe: no credit comes back
    number = started(agent)
    for _ in range(OUTPUT_WINDOW // 65536 + 1):
        agent.send(protocol.STDOUT, number, bytes(65536))
    assert "allowed" in str(wait_lost(client))
    os.set_blocking(pipe[0], False)
    deadline = time.monotonic() + 30
    while not handle.is_finished:  # what was within the window still reaches its reader
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError):
            os.read(pipe[0], 1 << 20)
        time.sleep(0.001)


def test_slow_reader_gets_every_byte(pair: Pair, pipe: tuple[int, int]) -> None:
    agent, client = pair
    handle = client.exec(["cmd"], stdout=pipe[1])
    number = started(agent)
    data = bytes(range(256)) * 1024
    for start in range(0, len(data), 65536):
        agent.send(protocol.STDOUT, number, data[start : start + 65536])
    ended(agent, number)
    assert not handle.is_finished
    received = b""
    while len(received) < len(data):
        received += os.read(pipe[0], 65536)
    assert (handle.wait(30), received == data) == (0, True)


def test_flags_of_the_callers_descriptor_stay_as_they_are(pair: Pair, pipe: tuple[int, int]) -> None:
    agent, client = pair
    handle = client.exec(["cmd"], stdout=pipe[1])
    ended(agent, started(agent))
    handle.wait(30)
    assert os.get_blocking(pipe[1])


def test_regular_file_is_appended_where_it_stands(pair: Pair, tmp_path: Path) -> None:
    agent, client = pair
    with open(tmp_path / "out", "wb", buffering=0) as stream:
        stream.write(b"before ")
        handle = client.exec(["cmd"], stdout=stream.fileno())
        number = started(agent)
        agent.send(protocol.STDOUT, number, b"after")
        ended(agent, number)
        handle.wait(30)
    assert (tmp_path / "out").read_bytes() == b"before after"


def test_socket_takes_output(pair: Pair) -> None:
    import socket

    agent, client = pair
    near, far = socket.socketpair()
    with near, far:
        handle = client.exec(["cmd"], stdout=near.fileno())
        number = started(agent)
        for _ in range(10):
            agent.send(protocol.STDOUT, number, bytes(60000))
        ended(agent, number)
        count = 0
        while count < 600000:
            count += len(far.recv(65536))
        assert handle.wait(30) == 0
        assert near.getblocking()


def test_reader_that_goes_away_closes_the_guests_stream(pair: Pair, pipe: tuple[int, int]) -> None:
    agent, client = pair
    handle = client.exec(["yes"], stdout=pipe[1])
    number = started(agent)
    os.close(pipe[0])
    agent.send(protocol.STDOUT, number, b"y\n")
    assert agent.expect(protocol.CLOSE) == (number, b"\x01\0\0\0\0\0\0\0")
    agent.send(protocol.STDOUT, number, b"y\n")  # was on its way
    agent.send_words(protocol.EXIT, number, protocol.EXIT_SIGNAL, 13)
    agent.send(protocol.STDOUT, number, b"", protocol.FLAG_EOF)
    agent.send(protocol.STDERR, number, b"", protocol.FLAG_EOF)
    assert handle.wait(30) == 141


def test_full_device_is_an_error_of_the_host(pair: Pair) -> None:
    agent, client = pair
    with open("/dev/full", "wb", buffering=0) as full:
        handle = client.exec(["cmd"], stdout=full.fileno())
        number = started(agent)
        agent.send(protocol.STDOUT, number, b"x")
        agent.expect(protocol.CLOSE)
        ended(agent, number)
        with pytest.raises(HostError, match="writing stdout of cmd: No space left"):
            handle.wait(30)


def test_capture_keeps_to_its_limit(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cmd"], stdout=Capture(limit=4))
    number = started(agent)
    agent.send(protocol.STDOUT, number, b"abc")
    agent.send(protocol.STDOUT, number, b"def")
    ended(agent, number)
    assert (handle.wait(30), handle.stdout, handle.is_truncated) == (0, b"abcd", True)


def test_stdin_follows_started_within_the_window(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cat"], stdin=b"abcdef")
    number = started(agent, stdin_window=4)
    assert agent.next_frame() == (protocol.STDIN, 0, number, b"abcd")
    agent.send_words(protocol.WINDOW, number, protocol.STREAM_STDIN, 100)
    assert agent.next_frame() == (protocol.STDIN, 0, number, b"ef")
    assert agent.next_frame() == (protocol.STDIN, protocol.FLAG_EOF, number, b"")
    ended(agent, number)
    assert handle.wait(30) == 0


def test_stdin_is_read_from_a_pipe(pair: Pair, pipe: tuple[int, int]) -> None:
    agent, client = pair
    handle = client.exec(["cat"], stdin=pipe[0])
    number = started(agent, stdin_window=1000)
    os.write(pipe[1], b"one")
    assert agent.next_frame() == (protocol.STDIN, 0, number, b"one")
    os.close(pipe[1])
    assert agent.next_frame() == (protocol.STDIN, protocol.FLAG_EOF, number, b"")
    ended(agent, number)
    assert handle.wait(30) == 0


@pytest.mark.parametrize("path", ["/dev/null", "file"])
def test_stdin_is_read_from_what_cannot_be_polled(pair: Pair, tmp_path: Path, path: str) -> None:
    agent, client = pair
    (tmp_path / "file").write_bytes(b"two")
    with open(tmp_path / path, "rb", buffering=0) as source:
        handle = client.exec(["cat"], stdin=source.fileno())
        number = started(agent, stdin_window=1000)
        if path == "file":
            assert agent.next_frame() == (protocol.STDIN, 0, number, b"two")
        assert agent.next_frame() == (protocol.STDIN, protocol.FLAG_EOF, number, b"")
        ended(agent, number)
        assert handle.wait(30) == 0


def test_command_that_closes_its_input_breaks_the_pipe(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["head"], stdin="pipe")
    number = started(agent, stdin_window=2)
    agent.send_words(protocol.CLOSE, number, protocol.STREAM_STDIN, 0)
    client_saw_exit(client, agent)
    with pytest.raises(BrokenPipeError):
        handle.write_stdin(b"more", timeout_s=30)
    ended(agent, number)
    assert handle.wait(30) == 0


def test_write_stdin_waits_for_the_command_to_read(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cat"], stdin="pipe")
    number = started(agent, stdin_window=2)
    with pytest.raises(TimeoutError, match="does not read its input"):
        handle.write_stdin(b"abc", timeout_s=0.02)
    ended(agent, number)
    assert handle.wait(30) == 0


def test_write_stdin_needs_a_pipe(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["true"])
    ended(agent, started(agent))
    handle.wait(30)
    with pytest.raises(StateError, match='without stdin="pipe"'):
        handle.write_stdin(b"x")


def test_signals_and_sizes_reach_the_agent_until_the_end(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["sh"], tty=(80, 24))
    number = started(agent)
    handle.resize(100, 30)
    handle.signal(2)
    assert agent.expect(protocol.WINSIZE) == (number, b"\x64\0\x1e\0")
    assert agent.expect(protocol.SIGNAL) == (number, b"\x02\0\0\0")
    agent.send_words(protocol.EXIT, number, protocol.EXIT_CODE, 0)
    agent.send(protocol.STDOUT, number, b"", protocol.FLAG_EOF)
    assert handle.wait(30) == 0  # a terminal has no stderr to wait for
    handle.signal(2)
    client_saw_exit(client, agent)


def test_refusal_of_the_guest_is_an_error_with_its_errno(pair: Pair) -> None:
    agent, client = pair
    answering = threading.Thread(
        target=lambda: agent.send(protocol.RESULT, agent.expect(protocol.MOUNT)[0], b"\x13\0\0\0")
    )
    answering.start()
    with pytest.raises(GuestError, match="mounting ext4 /dev/vda at /mnt: No such device") as caught:
        client.mount("/dev/vda", "/mnt", "ext4")
    answering.join()
    assert caught.value.errno == 19


@pytest.mark.parametrize(
    "arguments",
    [{"argv": []}, {"argv": ["a\0b"]}, {"argv": ["a"], "env": {"A": "\0"}}, {"argv": ["a"], "tty": (70000, 1)}],
)
def test_exec_that_cannot_be_sent_is_a_config_error(pair: Pair, arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="exec: "):
        pair[1].exec(**arguments)  # type: ignore[arg-type]


HOSTILE = {
    "HELLO twice": lambda n: [protocol.encode(protocol.HELLO, 0, bytes(40))],
    "unknown type": lambda n: [protocol.encode(99, n)],
    "unknown exec": lambda n: [protocol.encode(protocol.STDOUT, n + 1, b"x")],
    "STARTED twice": lambda n: [protocol.encode(protocol.STARTED, n, b"\x01\0\0\0\0\0\0\0")],
    "EXEC_FAILED after STARTED": lambda n: [protocol.encode(protocol.EXEC_FAILED, n, b"\x05\0\0\0\x02\0\0\0")],
    "EXIT twice": lambda n: [protocol.encode(protocol.EXIT, n, bytes(8))] * 2,
    "EXIT malformed": lambda n: [protocol.encode(protocol.EXIT, n, bytes(7))],
    "output after its end": lambda n: [protocol.encode(protocol.STDOUT, n, b"", 1), protocol.encode(6, n, b"x")],
    "stdin credit without stdin": lambda n: [protocol.encode(protocol.WINDOW, n, bytes(8))],
    "credit for stdout": lambda n: [protocol.encode(protocol.WINDOW, n, b"\x01\0\0\0\x01\0\0\0")],
    "answer to nothing": lambda n: [protocol.encode(protocol.RESULT, 1000, bytes(4))],
    "PONG to nothing": lambda n: [protocol.encode(protocol.PONG, 1000, bytes(8))],
    "ERROR": lambda n: [protocol.encode(protocol.ERROR, 0, b"host spoke nonsense")],
    "message of the host": lambda n: [protocol.encode(protocol.EXEC, n, bytes(8))],
    "bad header": lambda n: [b"\xff" * 12],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_agent_that_breaks_the_rules_is_lost(pair: Pair, name: str) -> None:
    agent, client = pair
    handle = client.exec(["cmd"])
    number = started(agent)
    for frame in HOSTILE[name](number):
        agent.send_raw(frame)
    with pytest.raises(ChannelLost, match="protocol error"):
        handle.wait(30)
    assert "protocol error" in str(client.lost)


def test_stdin_credit_beyond_reason_is_a_protocol_error(pair: Pair) -> None:
    agent, client = pair
    handle = client.exec(["cat"], stdin="pipe")
    number = started(agent, stdin_window=0xFFFFFFFF)
    assert number
    with pytest.raises(ChannelLost, match="stdin credit"):
        handle.wait(30)


FRAMES = st.tuples(st.integers(0, 22), st.integers(0, 3), st.integers(0, 4), st.binary(max_size=12))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(FRAMES, max_size=12))
def test_no_sequence_of_frames_raises_on_the_loop(loop: DeviceLoop, frames: list[tuple[int, int, int, bytes]]) -> None:
    import socket

    ours, theirs = socket.socketpair()
    agent = FakeAgent(theirs)
    client = AgentClient(ours.detach(), loop)
    agent.send_hello()
    handles = [client.exec(["a"]), client.exec(["b"], stdin=b"x"), client.exec(["c"], tty=(1, 1))]
    agent.send_raw(b"".join(protocol.encode(kind, number, payload, flags) for kind, flags, number, payload in frames))
    agent.close()
    for handle in handles:
        try:
            assert handle.wait(30) >= 0  # the frames may make sense
        except (ChannelLost, ExecFailed):
            assert handle.is_finished
    assert client.lost is not None
    client.close()


def test_release_after_the_loop_has_stopped_closes_all_and_wakes_who_waits(pipe: tuple[int, int]) -> None:
    ours, theirs = socket.socketpair()
    loop = DeviceLoop(lambda error: None)
    loop.start()
    agent, client = FakeAgent(theirs), AgentClient(ours.detach(), loop)
    agent.send_hello()
    agent.expect(protocol.HELLO)
    handle = client.exec(["yes"], stdout=pipe[1])
    number = started(agent)
    for _ in range(2):  # more than a pipe holds, and nobody reads it
        agent.send(protocol.STDOUT, number, b"y" * 65536)
    agent.send_words(protocol.EXIT, number, protocol.EXIT_CODE, 0)
    with pytest.raises(TimeoutError):
        handle.wait(0.05)
    loop.stop()
    client.release()
    with pytest.raises(ChannelLost, match="the guest has ended"):
        handle.wait(30)
    assert agent._stream.recv(1) == b""
    agent.close()
