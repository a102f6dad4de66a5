"""Every way a guest can end has its own exit code and one line that says so, soon after it happened; none is 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Command

from .conftest import SOON_S, STRETCH, TimedEnd

RunToEvent = Callable[..., TimedEnd]

SERVER = "$PPID"  # the agent's serving process is the parent of what it starts; PID 1 is another


def check(end: TimedEnd, code: int, complaint: str, *, within_s: float = SOON_S) -> None:
    print(f"{end.seconds:.2f} s from the event to the end")
    assert end.ended.code == code, end.ended
    assert complaint in end.ended.complaint
    assert end.seconds < within_s


def test_a_status_is_passed_on_without_a_word(run_to_event: RunToEvent) -> None:
    end = run_to_event("echo now; read line; echo out; echo err >&2; exit 7")
    assert (end.ended.code, end.ended.stdout, end.ended.stderr) == (7, b"out\n", "err\n")
    assert end.seconds < SOON_S


def test_a_panic_is_101(run_to_event: RunToEvent) -> None:
    check(run_to_event("echo now; read line; echo c > /proc/sysrq-trigger"), 101, "the guest kernel panicked")


def test_a_reboot_is_106(run_to_event: RunToEvent) -> None:
    check(run_to_event("echo now; read line; reboot -f"), 106, "the guest asked for a reset")


def test_a_poweroff_without_a_status_is_107(run_to_event: RunToEvent) -> None:
    check(run_to_event("echo now; read line; poweroff -f"), 107, "the guest powered off")


def test_a_triple_fault_is_105(run_to_event: RunToEvent) -> None:
    end = run_to_event("echo now; read line; reboot -f", "--append", "reboot=t")
    check(end, 105, "triple fault on vCPU 0")


def test_a_halt_is_103(run_to_event: RunToEvent) -> None:
    check(run_to_event("echo now; read line; halt -f"), 103, "the guest hangs")


def test_a_killed_agent_is_104(run_to_event: RunToEvent) -> None:
    end = run_to_event(f"echo now; read line; kill -9 {SERVER}; sleep 1000")
    check(end, 104, "lost the guest", within_s=SOON_S + 1)  # a second's grace for a better reason


def test_an_agent_killed_by_a_command_that_then_succeeds_is_104(run_to_event: RunToEvent) -> None:
    check(run_to_event(f"echo now; read line; kill -9 {SERVER}; exit 0"), 104, "lost the guest", within_s=SOON_S + 1)


def test_a_stopped_agent_is_103_after_the_hang_timeout(run_to_event: RunToEvent) -> None:
    end = run_to_event(f"echo now; read line; kill -STOP {SERVER}; sleep 1000", "--hang-timeout", "4")
    check(end, 103, "the agent has not answered for 4 s", within_s=4 + 2 + SOON_S)  # it is asked every 2 s


def test_an_endless_loop_is_124_at_the_time_limit(kvmlite: Command, kernel: Path) -> None:
    limit = 5 * STRETCH
    begin = time.monotonic()
    ended = kvmlite(
        "run", "--kernel", kernel, "--timeout", f"{limit:g}", "--", "sh", "-c", "while :; do :; done", timeout_s=200
    )
    assert ended.code == 124
    assert ended.complaint == f"ran into the time limit of {limit:g} s"
    assert limit <= time.monotonic() - begin < limit + SOON_S


def test_a_panic_before_the_agent_is_up_is_101_with_the_last_line(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite(
        "run", "--kernel", kernel, "--append", "rdinit=/nonexistent init=/nonexistent", "--", "true", timeout_s=200
    )
    assert ended.code == 101
    assert "the guest kernel panicked before it was up; the last line on its console: [" in ended.complaint


def test_a_guest_that_never_comes_up_is_102(kvmlite: Command, kernel: Path) -> None:
    begin = time.monotonic()
    ended = kvmlite(
        "run", "--kernel", kernel, "--boot-timeout", "12", "--append", "rdinit=/bin/sleep -- 1000", "--", "true",
        timeout_s=200,
    )  # fmt: skip
    assert ended.code == 102
    assert ended.complaint.startswith("the guest did not come up within 12 s; ")
    assert time.monotonic() - begin < 12 + 2 * SOON_S  # before the limit begins, the host's files are read


def test_a_damaged_initrd_never_gives_success(kvmlite: Command, kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(b"070701" + b"\xff" * 100_000)
    ended = kvmlite(
        "run", "--kernel", kernel, "--initrd", tmp_path / "initrd", "--", "sh", "-c", "exit 3", timeout_s=200
    )
    assert ended.code in (3, 101, 102), ended  # ours comes first and is whole: Linux uses what it could unpack


def test_sigterm_ends_the_guest_and_the_command(kvmlite: Command, kernel: Path) -> None:
    process = kvmlite.start("run", "--kernel", kernel, "--", "sh", "-c", "echo now; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    begin = time.monotonic()
    process.terminate()
    ended = kvmlite.finish(process)
    assert (ended.code, ended.stderr) == (143, "")
    assert time.monotonic() - begin < SOON_S


@pytest.mark.parametrize("stage", ["boot", "command"])
def test_ctrl_c_ends_it_with_130(kvmlite: Command, kernel: Path, stage: str) -> None:
    process = kvmlite.start("run", "--kernel", kernel, "--console", "--", "sh", "-c", "echo now; sleep 1000")
    assert process.stdout is not None
    assert process.stderr is not None
    ready = process.stderr if stage == "boot" else process.stdout
    assert ready.readline() != b""
    begin = time.monotonic()
    process.send_signal(2)
    ended = kvmlite.finish(process)
    assert ended.code == 130
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - begin < SOON_S
