"""Commands in one running guest: streams, terminals, users, signals, floods."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmlite import ExecFailed, GuestConfig, LinuxGuest
from kvmlite.guest.execution import ExecHandle

from .conftest import SOON_S, STRETCH

PATIENCE_S = 15 * STRETCH


@pytest.fixture(scope="module")
def guest(kernel: Path, kvmlite_home: Path) -> Iterator[LinuxGuest]:
    """One guest for all tests here. Its memory is a memfd, so that anonymous memory is the VMM's own."""
    config = GuestConfig(kernel=kernel, vcpu_count=2, memory_backing="memfd")
    with LinuxGuest(config) as guest:
        guest.start()
        guest.wait_agent()
        yield guest
        assert not guest.machine.has_ended(), guest.machine.wait().outcome


def run(guest: LinuxGuest, *argv: str, **options: object) -> ExecHandle:
    """Run a command to its end."""
    handle = guest.exec(argv, **options)
    handle.wait(PATIENCE_S)
    return handle


def shell(guest: LinuxGuest, script: str, **options: object) -> ExecHandle:
    return run(guest, "sh", "-c", script, **options)


def test_streams_are_separate_and_the_status_is_the_commands(guest: LinuxGuest) -> None:
    handle = shell(guest, "echo out; echo err >&2; exit 7")
    assert (handle.exit_code, handle.stdout, handle.stderr) == (7, b"out\n", b"err\n")


def test_the_guest_has_two_processors(guest: LinuxGuest) -> None:
    assert run(guest, "nproc").stdout == b"2\n"


def test_bytes_pass_unchanged(guest: LinuxGuest) -> None:
    everything = bytes(range(256)) * 16
    assert run(guest, "cat", stdin=everything).stdout == everything


def test_8_mib_stream_in_and_out_at_once(guest: LinuxGuest) -> None:
    data = os.urandom(8 << 20)
    assert run(guest, "cat", stdin=data).stdout == data


def test_input_comes_from_a_descriptor_until_it_ends(guest: LinuxGuest) -> None:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        handle = guest.exec(["sh", "-c", "read line; echo got $line; cat | wc -c"], stdin=read_end)
        os.write(write_end, b"one\n")
        deadline = time.monotonic() + PATIENCE_S
        while not handle.stdout and time.monotonic() < deadline:
            time.sleep(0.01)
        assert handle.stdout == b"got one\n"
        os.write(write_end, b"x" * 1000)
        os.close(write_end)
        write_end = -1
        handle.wait(PATIENCE_S)
        assert handle.stdout == b"got one\n1000\n"
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


def test_without_input_a_command_reads_the_end_of_file(guest: LinuxGuest) -> None:
    assert run(guest, "wc", "-c").stdout == b"0\n"


def test_the_environment_is_what_was_given_and_the_bare_minimum(guest: LinuxGuest) -> None:
    lines = run(guest, "env", env={"GREETING": "hello world\nsecond line", "EMPTY": ""}).stdout.decode()
    assert "GREETING=hello world\nsecond line\n" in lines
    assert "EMPTY=\n" in lines
    names = {line.partition("=")[0] for line in lines.splitlines() if "=" in line}
    assert names == {"GREETING", "EMPTY", "PATH", "HOME", "USER", "LOGNAME"}


def test_arguments_arrive_as_they_are(guest: LinuxGuest) -> None:
    strange = ["", " ", "a\nb", "*", "ü€", "-n", "$HOME", "x" * 100_000]
    handle = run(guest, "sh", "-c", 'for a; do printf "%s\\0" "$a"; done', "sh", *strange)
    assert handle.stdout.decode().split("\0")[:-1] == strange


@pytest.mark.parametrize(("cwd", "shown"), [("", b"/\n"), ("/proc/sys", b"/proc/sys\n")])
def test_a_command_runs_where_it_was_asked_to(guest: LinuxGuest, cwd: str, shown: bytes) -> None:
    assert run(guest, "pwd", cwd=cwd).stdout == shown


def test_a_directory_that_is_not_there_is_named(guest: LinuxGuest) -> None:
    with pytest.raises(ExecFailed, match="'/nosuch': No such file or directory") as caught:
        run(guest, "true", cwd="/nosuch")
    assert (caught.value.stage, caught.value.exit_code) == ("cwd", 125)


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", b"0 0 0\n"),
        ("nobody", b"65534 65534 65534\n"),
        ("1234", b"1234 1234 1234\n"),
        ("1234:5", b"1234 5 5\n"),
        ("nobody:tty", b"65534 5 5\n"),
    ],
)
def test_a_command_runs_as_the_user_asked_for(guest: LinuxGuest, user: str, ids: bytes) -> None:
    assert shell(guest, "echo $(id -u) $(id -g) $(id -G)", user=user).stdout == ids


def test_nobody_has_no_privileges(guest: LinuxGuest) -> None:
    handle = shell(guest, "grep CapEff /proc/self/status; cat /kvmlite/agent.conf", user="nobody")
    assert handle.stdout == b"CapEff:\t0000000000000000\n"
    assert b"Permission denied" in handle.stderr


def test_a_user_that_is_not_there_is_named(guest: LinuxGuest) -> None:
    with pytest.raises(ExecFailed, match="user 'who': no such user or group in the guest"):
        run(guest, "true", user="who")


@pytest.mark.parametrize(
    ("argv", "code"), [(["nosuch"], 127), (["/no/such"], 127), (["/etc/passwd"], 126), (["/etc"], 126)]
)
def test_a_command_that_cannot_start_has_the_codes_of_a_shell(guest: LinuxGuest, argv: list[str], code: int) -> None:
    with pytest.raises(ExecFailed) as caught:
        run(guest, *argv)
    assert caught.value.exit_code == code


@pytest.mark.parametrize("number", [1, 9, 11, 15])
def test_a_command_killed_by_a_signal_gives_128_and_its_number(guest: LinuxGuest, number: int) -> None:
    handle = shell(guest, f"kill -{number} $$")
    assert (handle.exit_code, handle.term_signal) == (128 + number, number)


def test_a_signal_reaches_the_commands_whole_process_group(guest: LinuxGuest) -> None:
    handle = guest.exec(["sh", "-c", "sleep 1000 | sleep 1000"])
    handle.wait_started(PATIENCE_S)
    handle.signal(15)
    assert handle.wait(PATIENCE_S) == 143
    deadline = time.monotonic() + PATIENCE_S
    while b"sleep 1000" in run(guest, "ps", "-o", "args").stdout:  # the shell may be the first of them to be gone
        assert time.monotonic() < deadline


def test_a_terminal_has_the_size_asked_for_and_changes_it(guest: LinuxGuest) -> None:
    script = "stty size; trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.1; done"
    handle = guest.exec(["sh", "-c", script], tty=(132, 43))
    wait_for(handle, b"ready")
    handle.resize(100, 50)
    assert handle.wait(PATIENCE_S) == 4
    assert handle.stdout == b"43 132\r\nready\r\n50 100\r\n"


def test_ctrl_c_through_the_terminal_interrupts(guest: LinuxGuest) -> None:
    handle = guest.exec(["sh", "-c", "echo ready; sleep 1000"], tty=(80, 24), stdin="pipe")
    wait_for(handle, b"ready")
    handle.write_stdin(b"\x03", PATIENCE_S)
    assert handle.wait(PATIENCE_S) == 130


def test_a_command_without_a_terminal_has_none(guest: LinuxGuest) -> None:
    assert run(guest, "tty").stdout == b"not a tty\n"


def test_orphans_are_reaped(guest: LinuxGuest) -> None:
    for _ in range(5):
        assert shell(guest, "(sleep 0.01; sleep 0.01) & exit 0", stdout=None, stderr=None).exit_code == 0
    deadline = time.monotonic() + PATIENCE_S
    while True:
        states = [line.split() for line in run(guest, "ps", "-o", "stat,comm").stdout.decode().splitlines()]
        dead = [line for line in states if line[0].startswith("Z") or line[1:] == ["sleep"]]
        if not dead or time.monotonic() > deadline:
            break
    assert dead == []


def test_commands_run_side_by_side(guest: LinuxGuest) -> None:
    handles = [guest.exec(["sh", "-c", f"sleep 0.3; echo {number}; exit {number}"]) for number in range(16)]
    assert [handle.wait(PATIENCE_S) for handle in handles] == list(range(16))
    assert [handle.stdout for handle in handles] == [f"{number}\n".encode() for number in range(16)]


def test_callers_may_use_any_thread(guest: LinuxGuest) -> None:
    codes: dict[int, int] = {}
    threads = [
        threading.Thread(target=lambda n=n: codes.update({n: shell(guest, f"exit {n}").exit_code})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {n: n for n in range(8)}


def test_many_commands_cost_the_agent_nothing_lasting(guest: LinuxGuest) -> None:
    count = "ls /proc/$PPID/fd | wc -l; grep VmRSS /proc/$PPID/status"
    before = shell(guest, count).stdout
    for _ in range(20):
        run(guest, "true", stdin=b"unread")
    after = shell(guest, count).stdout
    assert after.split()[0] == before.split()[0]


def test_a_flood_waits_for_a_slow_reader_and_keeps_the_vmm_small(guest: LinuxGuest) -> None:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        handle = guest.exec(["yes"], stdout=write_end)
        handle.wait_started(PATIENCE_S)
        before = anonymous_kib()
        time.sleep(1.0 * STRETCH)  # nobody reads
        assert anonymous_kib() - before < 8 << 10
        assert run(guest, "echo", "meanwhile").stdout == b"meanwhile\n"  # and nobody else waits
        taken = 0
        while taken < 4 << 20:
            chunk = os.read(read_end, 65536)
            assert chunk.strip(b"y\n") == b""
            taken += len(chunk)
        assert anonymous_kib() - before < 8 << 10
        os.close(read_end)
        read_end = -1
        assert handle.wait(PATIENCE_S) == 141  # SIGPIPE, as in any pipeline
    finally:
        os.close(write_end)
        if read_end >= 0:
            os.close(read_end)


def test_a_flood_on_both_streams_loses_nothing(guest: LinuxGuest) -> None:
    script = "head -c 2097152 /dev/zero & head -c 2097152 /dev/zero | tr '\\0' x >&2; wait"
    handle = shell(guest, script)
    assert (len(handle.stdout), len(handle.stderr)) == (2 << 20, 2 << 20)
    assert handle.stderr.strip(b"x") == b""


def test_the_guests_clock_is_ours(guest: LinuxGuest) -> None:
    earliest = time.time()
    shown = float(shell(guest, "date +%s").stdout)
    assert earliest - 2 < shown < time.time() + 2


def test_a_paused_guest_stands_still_and_goes_on(guest: LinuxGuest) -> None:
    ticker = guest.exec(["sh", "-c", "while :; do echo tick; sleep 0.05; done"])
    wait_for(ticker, b"tick")
    guest.machine.pause()
    seen = -1
    while seen != len(ticker.stdout):  # what was under way arrives
        seen = len(ticker.stdout)
        time.sleep(0.1 * STRETCH)
        guest.machine.loop.call(lambda: None, PATIENCE_S)
    with pytest.raises(TimeoutError):
        guest.agent.ping(0.5)
    assert len(ticker.stdout) == seen
    guest.machine.resume()
    deadline = time.monotonic() + PATIENCE_S
    while len(ticker.stdout) == seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(ticker.stdout) > seen
    ticker.signal(9)
    assert ticker.wait(PATIENCE_S) == 137


def test_an_idle_guest_answers_soon(guest: LinuxGuest) -> None:
    guest.agent.ping(SOON_S)


def wait_for(handle: ExecHandle, wanted: bytes) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while wanted not in handle.stdout:
        assert time.monotonic() < deadline, handle.stdout
        time.sleep(0.01)


def anonymous_kib() -> int:
    """This process's own memory; that of the guest is a memfd's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon in /proc/self/status")
