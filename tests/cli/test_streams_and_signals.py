"""The command among other programs: closed, full and broken streams, Ctrl-C and SIGTERM at every stage."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from support.command import ROOT, Command

from .conftest import bzimage

pytestmark = pytest.mark.kvm

# Sends its own process a signal at one audit event (an import, an opened file): a Ctrl-C at exactly that moment.
SITECUSTOMIZE = """
import os, sys
event, what, number = os.environ["SIGNAL_AT"].split(" ")
state = []
def hook(name, arguments):
    if name == event and not state and what in str(arguments[0]):
        state.append(1)
        os.kill(os.getpid(), int(number))
sys.addaudithook(hook)
"""


@pytest.fixture
def signal_at(tmp_path: Path) -> dict[str, str]:
    """Environment in which SIGNAL_AT, "event what number", works."""
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": f"{directory}:{ROOT}/src"}


def test_a_guest_prints_and_gives_its_status(kvmlite: Command, print_and_exit_7: Path) -> None:
    ended = kvmlite("run", "--bare", "--kernel", print_and_exit_7)
    assert (ended.code, ended.stdout, ended.stderr) == (7, b"x\n", "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_as_good_as_dev_null(kvmlite: Command, print_and_exit_7: Path, closed: str) -> None:
    ended = kvmlite.shell(f'exec "$@" {closed}', "run", "--bare", "--kernel", print_and_exit_7)
    assert (ended.code, ended.stderr) == (7, "")
    assert ended.stdout == (b"" if ">&-" in closed.split() else b"x\n")


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("kernel", "ls"), ("doctor",)], ids=" ".join)
def test_output_that_cannot_be_written_is_an_error(kvmlite: Command, arguments: tuple[str, ...]) -> None:
    ended = kvmlite.shell('exec "$@" >/dev/full', *arguments)
    assert ended.code == 125
    assert ended.complaint == "cannot write the output: No space left on device"


def test_a_guests_output_that_cannot_be_written_is_an_error_whatever_its_status(
    kvmlite: Command, print_and_exit_7: Path
) -> None:
    ended = kvmlite.shell('exec "$@" >/dev/full', "run", "--bare", "--kernel", print_and_exit_7)
    assert ended.code == 125
    assert ended.complaint == "cannot write the guest's console to standard output: No space left on device"


def test_a_guest_that_prints_for_ever_ends_with_its_reader(kvmlite: Command, print_for_ever: Path) -> None:
    ended = kvmlite.shell('"$@" | head -1; exit ${PIPESTATUS[0]}', "run", "--bare", "--kernel", print_for_ever)
    assert (ended.code, ended.stdout, ended.stderr) == (141, b"x\n", "")


def test_a_listing_ends_with_its_reader(kvmlite: Command) -> None:
    ended = kvmlite.shell('"$@" | exit 0; exit ${PIPESTATUS[0]}', "run", "--help")
    assert (ended.code, ended.stderr) in ((141, ""), (0, ""))  # it may have been faster than its reader's end


def test_a_guest_that_prints_for_ever_ends_at_its_time_limit(kvmlite: Command, print_for_ever: Path) -> None:
    ended = kvmlite.shell('"$@" >/dev/null', "run", "--bare", "--kernel", print_for_ever, "--timeout", "0.3")
    assert (ended.code, ended.complaint) == (124, "ran into the time limit of 0.3 s")


def test_a_reader_that_sleeps_does_not_outlast_the_time_limit(kvmlite: Command, print_for_ever: Path) -> None:
    for limit in ("0.5", "5", "25"):  # a busy host may not get as far as the guest in half a second
        process = kvmlite.start("run", "--bare", "--kernel", print_for_ever, "--timeout", limit)
        assert process.wait(60) == 124  # before anybody reads
        ended = kvmlite.finish(process)
        if ended.stdout:
            break
    assert ended.stdout.startswith(b"x\nx\n")


STAGES = {
    "imports the command": ("import", "kvmlite.cli.run"),
    "imports the machine": ("import", "kvmlite.machine.machine"),
    "imports C": ("import", "kvmlite._native._kvl"),
    "opens KVM": ("open", "/dev/kvm"),
    "opens the kernel": ("open", ".elf"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_a_guest_is_made_ends_it_without_a_traceback(
    kvmlite: Command, loop_for_ever: Path, signal_at: dict[str, str], stage: str, number: int
) -> None:
    event, what = STAGES[stage]
    signal_at["SIGNAL_AT"] = f"{event} {what} {number}"
    ended = kvmlite("run", "--bare", "--kernel", loop_for_ever, "--timeout", "50", env=signal_at)
    assert ended.code == 128 + number
    assert ended.stderr == ("kvmlite: interrupted\n" if number == signal.SIGINT else "")


def test_ctrl_c_before_there_is_anything_to_put_back_is_the_end_of_it(
    kvmlite: Command, signal_at: dict[str, str]
) -> None:
    signal_at["SIGNAL_AT"] = f"import kvmlite.errors {signal.SIGINT}"
    ended = kvmlite("run", "--bare", "--kernel", "x", env=signal_at)
    assert (ended.code, ended.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("number", "complaint"), [(signal.SIGINT, "kvmlite: interrupted\n"), (signal.SIGTERM, ""), (signal.SIGHUP, "")]
)
def test_a_signal_ends_a_running_guest_soon(
    kvmlite: Command, print_for_ever: Path, number: int, complaint: str
) -> None:
    process = kvmlite.start("run", "--bare", "--kernel", print_for_ever)
    assert process.stdout is not None
    assert process.stdout.read(2) == b"x\n"  # it runs
    os.kill(process.pid, number)
    ended = kvmlite.finish(process)
    assert (ended.code, ended.stderr) == (128 + number, complaint)


def test_ignored_signals_stay_ignored(kvmlite: Command, print_for_ever: Path) -> None:
    for limit in ("1", "5", "25"):  # a busy host may not get as far as the guest in a second
        process = kvmlite.start(
            "run", "--bare", "--kernel", print_for_ever, "--timeout", limit, prefix=("/bin/sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh")
        )  # fmt: skip
        assert process.stdout is not None
        has_begun = process.stdout.read(2) == b"x\n"
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(process.pid, number)
        assert kvmlite.finish(process).code == 124
        if has_begun:
            return
    pytest.fail("the guest printed nothing")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("what", ["vmlinuz", ".staging-"])
def test_a_signal_while_a_kernel_is_added_leaves_no_draft(
    kvmlite: Command, tmp_path: Path, signal_at: dict[str, str], what: str, number: int
) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    signal_at["SIGNAL_AT"] = f"open {what} {number}"
    ended = kvmlite("kernel", "add", "-q", tmp_path / "vmlinuz", env=signal_at)
    assert ended.code == 128 + number
    assert "Traceback" not in ended.stderr
    assert kvmlite("kernel", "ls", "-q").stdout == b""


def test_a_signal_while_the_initramfs_is_built_leaves_no_draft(
    kvmlite: Command, tmp_path: Path, signal_at: dict[str, str]
) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    signal_at["SIGNAL_AT"] = f"open archive {signal.SIGINT}"
    ended = kvmlite("run", "--force", "--kernel", tmp_path / "vmlinuz", "--", "true", env=signal_at)
    assert (ended.code, ended.stderr) == (130, "kvmlite: interrupted\n")


def test_sigterm_puts_the_terminal_back(kvmlite: Command, loop_for_ever: Path) -> None:
    leader, terminal = pty.openpty()
    try:
        before = termios.tcgetattr(terminal)
        process = kvmlite.start(
            "run", "--bare", "--kernel", loop_for_ever, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while termios.tcgetattr(terminal) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert kvmlite.finish(process).code == 143
        assert termios.tcgetattr(terminal) == before
    finally:
        os.close(leader)
        os.close(terminal)


def test_what_is_typed_reaches_a_bare_guest(kvmlite: Command, assemble: object) -> None:
    echo = """
1:  mov $0x3fd, %dx
    in %dx, %al
    test $1, %al
    jz 1b
    mov $0x3f8, %dx
    in %dx, %al
    out %al, %dx
    cmp $'q', %al
    jne 1b
    debug_exit 0
"""
    ended = kvmlite("run", "--bare", "--kernel", assemble(echo), "--timeout", "50", input=b"hello q")  # type: ignore[operator]
    assert (ended.code, ended.stdout) == (1, b"hello q")


def test_nothing_is_read_from_a_terminal_in_the_background(kvmlite: Command) -> None:
    leader, terminal = pty.openpty()
    try:
        ended = kvmlite("--version", stdin=terminal)
        assert ended.stdout.startswith(b"kvmlite, version ")
        assert not select.select([leader], [], [], 0)[0]
    finally:
        os.close(leader)
        os.close(terminal)
