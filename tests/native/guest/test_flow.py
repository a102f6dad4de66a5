"""Floods, stalls and streams that end early: nothing is lost, nothing blocks anything else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmlite.guest.agent import AgentClient, ExecHandle

from .conftest import PATH, AgentProcess

Run = Callable[..., ExecHandle]
ENV = {"PATH": PATH}
MIB = 1 << 20


@pytest.fixture
def stalled_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads until the test does."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def wait_stalled(pid: int) -> None:
    """Wait until a process has written more than a window, and then nothing for 20 ms: windows and pipes are full."""
    written, before = 0, -1
    while written <= MIB or written != before:
        time.sleep(0.02)
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        written, before = int(fields["wchar"]), written


def test_every_byte_of_a_flood_arrives(client: AgentClient) -> None:
    sizes: list[int] = []
    handle = client.exec(["head", "-c", "32M", "/dev/zero"], env=ENV, stdout=lambda data: sizes.append(len(data)))
    assert handle.wait(60) == 0
    assert sum(sizes) == 32 * MIB


def test_both_streams_flood_at_once(client: AgentClient) -> None:
    script = "head -c 4M /dev/zero & head -c 4M /dev/zero >&2; wait"
    handle = client.exec(["sh", "-c", script], env=ENV)
    assert handle.wait(60) == 0
    assert (len(handle.stdout), len(handle.stderr)) == (4 * MIB, 4 * MIB)


def test_stalled_output_blocks_neither_status_nor_signals_nor_others(
    client: AgentClient, run: Run, stalled_pipe: tuple[int, int]
) -> None:
    flood = client.exec(["sh", "-c", "echo err >&2; exec yes"], env=ENV, stdout=stalled_pipe[1])
    while flood.stderr != b"err\n":
        time.sleep(0.001)
    wait_stalled(flood.pid)
    assert run("echo", "other").stdout == b"other\n"
    assert client.ping() > 0
    flood.signal(9)
    deadline = time.monotonic() + 30
    while flood.exit_code is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (flood.exit_code, flood.is_finished) == (137, False)
    os.set_blocking(stalled_pipe[0], False)
    received = bytearray()
    while not flood.is_finished:
        try:
            received += os.read(stalled_pipe[0], MIB)
        except BlockingIOError:
            time.sleep(0.001)
    assert flood.wait(30) == 137
    assert received.startswith(b"y\ny\n")
    assert len(received) > MIB


@pytest.mark.parametrize("program", ["shipped"], indirect=True)  # not the sanitizer's own memory
def test_agents_memory_is_bounded_under_a_flood(
    client: AgentClient, agent_process: AgentProcess, stalled_pipe: tuple[int, int]
) -> None:
    handle = client.exec(["yes"], env=ENV, stdin="pipe", stdout=stalled_pipe[1])
    sink = client.exec(["sleep", "100"], env=ENV, stdin="pipe")
    handle.wait_started(30)
    with pytest.raises(TimeoutError):
        sink.write_stdin(bytes(4 * MIB), timeout_s=0.2)
    status = Path(f"/proc/{agent_process.process.pid}/status").read_text()
    resident_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    handle.signal(9)
    sink.signal(9)
    assert resident_kib < 2048


def test_reader_that_closes_early_ends_the_command_by_sigpipe(client: AgentClient) -> None:
    with subprocess.Popen(["head", "-n", "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        handle = client.exec(["yes"], env=ENV, stdout=reader.stdin.fileno())
        assert (handle.wait(30), handle.term_signal) == (141, 13)
        reader.stdin.close()
        assert reader.stdout is not None
        assert reader.stdout.read() == b"y\ny\n"


def test_background_process_does_not_hold_up_the_end(run: Run) -> None:
    handle = run("sh", "-c", "sleep 100 & echo $!")
    os.kill(int(handle.stdout), signal.SIGKILL)  # it still runs, with the command's streams
    assert handle.exit_code == 0


def test_background_flood_does_not_hold_up_the_end(run: Run) -> None:
    handle = run("sh", "-c", "yes & sleep 0.05; echo now >&2; exit 4", stdout=None)
    assert (handle.exit_code, handle.stderr) == (4, b"now\n")


def test_last_words_come_before_the_end_however_many(run: Run) -> None:
    for _ in range(20):
        assert len(run("head", "-c", "700000", "/dev/zero").stdout) == 700000


def test_command_that_closes_its_streams_early_still_has_a_status(run: Run) -> None:
    assert run("sh", "-c", "exec >&- 2>&-; sleep 0.05; exit 5").exit_code == 5


def test_command_that_closes_its_input_is_not_fed(client: AgentClient) -> None:
    handle = client.exec(["sh", "-c", "exec <&-; sleep 0.2; exit 6"], env=ENV, stdin="pipe")
    handle.wait_started(30)
    with pytest.raises(BrokenPipeError):
        handle.write_stdin(bytes(100 * MIB), timeout_s=30)
    assert handle.wait(30) == 6


def test_agent_leaks_no_descriptors(client: AgentClient, run: Run, agent_process: AgentProcess) -> None:
    fds = Path(f"/proc/{agent_process.process.pid}/fd")

    def count() -> int:
        client.ping(30)  # what it was at when it told us of the end is done
        return len(list(fds.iterdir()))

    run("true")
    before = count()
    for _ in range(10):
        run("cat", stdin=b"x")
        run("true", tty=(80, 24))
    assert count() == before
