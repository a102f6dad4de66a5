"""Commands run by the real agent: status, streams, terminal, user, environment."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlite.guest.agent import AgentClient, ExecFailed, ExecHandle
from kvmlite.host.loop import DeviceLoop

from .conftest import PATH, AgentProcess

Run = Callable[..., ExecHandle]
ENV = {"PATH": PATH}


def test_hello_names_the_kernel(client: AgentClient) -> None:
    hello = client.hello(30)
    assert (hello.kernel_release, hello.channel, hello.is_system) == (os.uname().release, "fd", False)
    assert hello.start_ns <= hello.now_ns <= time.monotonic_ns()


def test_streams_are_separate(run: Run) -> None:
    handle = run("sh", "-c", "echo out; echo err >&2")
    assert (handle.stdout, handle.stderr) == (b"out\n", b"err\n")


def test_stderr_can_be_merged(run: Run) -> None:
    handle = run("sh", "-c", "echo out; echo err >&2", stderr="stdout")
    assert (handle.stdout, handle.stderr) == (b"out\nerr\n", b"")


@pytest.mark.parametrize("code", [0, 1, 126, 255])
def test_exit_code_passes_through(run: Run, code: int) -> None:
    handle = run("sh", "-c", f"exit {code}")
    assert (handle.exit_code, handle.term_signal) == (code, 0)


def test_signal_is_128_plus_its_number(run: Run) -> None:
    handle = run("sh", "-c", "kill -9 $$")
    assert (handle.exit_code, handle.term_signal) == (137, 9)


@pytest.mark.parametrize(
    ("argv", "options", "stage", "exit_code"),
    [
        (["no-such-program"], {}, "exec", 127),
        (["/no/such/program"], {}, "exec", 127),
        (["/etc/passwd"], {}, "exec", 126),
        (["/tmp"], {}, "exec", 126),
        ([""], {}, "exec", 127),
        (["true"], {"user": "no-such-user"}, "user", 125),
        (["true"], {"user": "root:no-such-group"}, "user", 125),
        (["true"], {"cwd": "/no/such/directory"}, "cwd", 125),
        (["true"], {"cwd": "/etc/passwd"}, "cwd", 125),
    ],
)
def test_command_that_cannot_start_says_why(
    run: Run, argv: list[str], options: dict[str, str], stage: str, exit_code: int
) -> None:
    with pytest.raises(ExecFailed) as caught:
        run(*argv, **options)
    assert (caught.value.stage, caught.value.exit_code) == (stage, exit_code)


def test_file_without_interpreter_line_is_not_run_by_a_shell(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    with pytest.raises(ExecFailed, match="Exec format error") as caught:
        run(str(script))
    assert caught.value.exit_code == 126


def test_path_is_the_commands_own(run: Run, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    assert run("tool", env={"PATH": f"/no/such:{tmp_path}:{PATH}"}).stdout == b"found\n"
    with pytest.raises(ExecFailed):
        run("tool", env={"PATH": PATH})


def test_environment_is_what_was_asked_and_the_basics(run: Run) -> None:
    lines = run("env", env={"A": "b c", "PATH": PATH}, user="0").stdout.decode().splitlines()
    assert sorted(lines) == ["A=b c", "HOME=/root", "LOGNAME=root", f"PATH={PATH}", "USER=root"]


def test_default_path_finds_programs(run: Run) -> None:
    assert run("env", env={}, user="0").stdout.startswith(b"PATH=/usr/local/sbin:")


def test_long_arguments_arrive(run: Run) -> None:
    text = "x" * 100_000
    assert run("printf", "%s%s", text, text).stdout == (text * 2).encode()


def test_directory_and_umask(run: Run) -> None:
    assert run("sh", "-c", "pwd; umask", cwd="/usr/bin").stdout == b"/usr/bin\n0022\n"
    assert run("pwd").stdout == b"/\n"


def test_command_has_three_descriptors_and_default_signals(run: Run) -> None:
    script = "ls /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status"
    lines = run("sh", "-c", script).stdout.split(b"\n")
    assert lines[0].strip() == b"4"  # 0, 1, 2 and the directory ls reads
    assert [line.split()[1] for line in lines[1:3]] == [b"0" * 16] * 2


def test_command_leads_its_own_session(run: Run) -> None:
    pid, group, session = run("sh", "-c", "cut -d' ' -f1,5,6 /proc/$$/stat").stdout.split()
    assert pid == group == session


@pytest.mark.root
@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", b"0 0 0\n"),
        ("nobody", b"65534 65534 65534\n"),
        ("65534", b"65534 65534 65534\n"),
        ("4242", b"4242 4242 4242\n"),
        ("4242:17", b"4242 17 17\n"),
        ("nobody:daemon", b"65534 1 1\n"),
    ],
)
def test_user_is_name_or_number_with_a_group(run: Run, user: str, expected: bytes) -> None:
    assert run("sh", "-c", "echo $(id -u) $(id -g) $(id -G)", user=user).stdout == expected


def test_stdin_is_null_unless_given(run: Run) -> None:
    assert run("cat").stdout == b""


@pytest.mark.parametrize("size", [0, 1, 61440, 61441, 3_000_000])
def test_stdin_arrives_whole(run: Run, size: int) -> None:
    data = os.urandom(size)
    assert run("cat", stdin=data).stdout == data


def test_command_may_leave_its_input_unread(run: Run) -> None:
    assert run("head", "-c", "3", stdin=b"abc" * 2_000_000).stdout == b"abc"


def test_input_can_be_written_step_by_step(client: AgentClient) -> None:
    seen: list[bytes] = []
    handle = client.exec(["cat"], env=ENV, stdin="pipe", stdout=seen.append)
    handle.write_stdin(b"one\n", 30)
    while b"".join(seen) != b"one\n":
        time.sleep(0.001)
    handle.write_stdin(b"x" * 2_000_000, 30)
    handle.close_stdin()
    assert handle.wait(30) == 0
    assert len(b"".join(seen)) == 2_000_004


def test_signal_reaches_the_whole_process_group(client: AgentClient) -> None:
    handle = client.exec(["sh", "-c", "sleep 100 & trap 'wait; exit 5' TERM; echo ready; wait"], env=ENV)
    handle.wait_started(30)
    while handle.stdout != b"ready\n":
        time.sleep(0.001)
    handle.signal(15)
    assert handle.wait(30) == 5


def test_terminal_is_controlling_and_has_a_size(run: Run) -> None:
    handle = run("sh", "-c", "tty; stty size; echo err >&2; cut -d' ' -f7 /proc/$$/stat", tty=(81, 25))
    lines = handle.stdout.split(b"\r\n")
    assert lines[0].startswith(b"/dev/pts/")
    assert lines[1:3] == [b"25 81", b"err"]
    assert int(lines[3]) != 0  # the number of its controlling terminal


def test_terminal_can_be_resized(client: AgentClient) -> None:
    handle = client.exec(
        ["sh", "-c", "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.01; done"],
        env=ENV,
        tty=(80, 24),
        stdin="pipe",
    )
    while b"ready" not in handle.stdout:
        time.sleep(0.001)
    handle.resize(100, 30)
    assert handle.wait(30) == 0
    assert b"30 100" in handle.stdout


def test_terminal_interrupts_on_control_c(client: AgentClient) -> None:
    handle = client.exec(["sh", "-c", "echo ready; exec sleep 100"], env=ENV, tty=(80, 24), stdin="pipe")
    while b"ready" not in handle.stdout:
        time.sleep(0.001)
    handle.write_stdin(b"\x03", 30)
    assert (handle.wait(30), handle.term_signal) == (130, 2)


@pytest.mark.parametrize("text", [b"line\n", b"no newline"])
def test_end_of_input_ends_a_terminal_reader(run: Run, text: bytes) -> None:
    handle = run("sh", "-c", "stty -echo; cat", tty=(80, 24), stdin=text)
    assert handle.exit_code == 0
    assert text.strip() in handle.stdout


def test_all_terminal_output_comes_before_the_end(run: Run) -> None:
    handle = run("seq", "20000", tty=(80, 24))
    assert handle.stdout.replace(b"\r", b"") == b"".join(b"%d\n" % number for number in range(1, 20001))


def test_many_commands_at_once(client: AgentClient) -> None:
    handles = [client.exec(["sh", "-c", f"sleep 0.05; echo {i}; exit {i}"], env=ENV) for i in range(40)]
    assert [handle.wait(60) for handle in handles] == list(range(40))
    assert [handle.stdout for handle in handles] == [b"%d\n" % i for i in range(40)]


@pytest.mark.open_files
def test_more_commands_than_the_limit_are_refused_not_lost(client: AgentClient) -> None:
    handles = [client.exec(["cat"], env=ENV, stdin="pipe") for _ in range(260)]
    for handle in handles[256:]:
        with pytest.raises(ExecFailed, match="Resource temporarily unavailable"):
            handle.wait(60)
    for handle in handles[:256]:
        handle.close_stdin()
    assert [handle.wait(60) for handle in handles[:256]] == [0] * 256


@pytest.mark.open_files
def test_a_low_limit_of_descriptors_is_the_commands_and_not_the_agents(
    program: Path, tmp_path: Path, loop: DeviceLoop
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        agent = AgentProcess(program, tmp_path / "agent.log")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    client = AgentClient(os.dup(agent.stream.fileno()), loop)
    agent.stream.close()
    try:
        handles = [client.exec(["sh", "-c", "cat; ulimit -n"], env=ENV, stdin="pipe") for _ in range(256)]
        for handle in handles:
            handle.close_stdin()
        assert [handle.wait(60) for handle in handles] == [0] * 256
        assert {handle.stdout for handle in handles} == {b"300\n"}
    finally:
        client.close()
        assert agent.finish() in (0, -9)


def test_agent_that_is_killed_loses_the_command(client: AgentClient, agent_process: AgentProcess) -> None:
    from kvmlite.guest.agent import ChannelLost

    handle = client.exec(["cat"], env=ENV, stdin="pipe")
    handle.wait_started(30)
    agent_process.process.kill()
    with pytest.raises(ChannelLost):
        handle.wait(30)
    assert handle.exit_code is None


def test_commands_are_killed_when_the_host_closes_the_channel(client: AgentClient) -> None:
    handle = client.exec(["sleep", "1000"], env=ENV)
    pid = handle.wait_started(30)
    client.close()
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.001)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ping_and_shutdown(client: AgentClient, agent_process: AgentProcess) -> None:
    assert client.ping() <= time.monotonic_ns()
    client.shutdown("poweroff")
    assert agent_process.process.wait(30) == 0  # no PID 1: it only ends itself
