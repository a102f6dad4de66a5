"""Guests of a Python program: nothing it holds is touched, and all is given back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import kvmlite
from kvmlite import BootError, Exited, GuestConfig, LinuxGuest, Panicked, Stopped, TimedOut, VmmError

from .conftest import SOON_S, STRETCH

PATIENCE_S = 15 * STRETCH


def test_run_gives_what_the_command_printed(kernel: Path, mappings: None) -> None:
    result = kvmlite.run("uname -a; echo err >&2; exit 4", kernel=kernel)
    assert result.stdout.startswith("Linux ")
    assert (result.stderr, result.exit_code, result.ok) == ("err\n", 4, False)
    assert result.outcome == Exited(code=4)
    with pytest.raises(kvmlite.CommandFailed, match="exited with status 4"):
        result.check()


def test_run_says_what_became_of_a_guest_that_gave_no_status(kernel: Path) -> None:
    result = kvmlite.run("echo so far; sleep 2; echo c > /proc/sysrq-trigger", kernel=kernel)
    assert result.outcome == Panicked()
    assert (result.exit_code, result.ok, result.stdout) == (None, False, "so far\n")


def test_run_ends_at_its_time_limit(kernel: Path) -> None:
    limit = 5 * STRETCH
    begin = time.monotonic()
    result = kvmlite.run("sleep 1000", kernel=kernel, timeout=limit)
    assert result.outcome == TimedOut(limit_s=limit)
    assert limit <= time.monotonic() - begin < limit + SOON_S


def test_two_guests_run_at_once_from_two_threads(kernel: Path, mappings: None) -> None:
    results: dict[int, tuple[bytes, object]] = {}
    meet = threading.Barrier(2, timeout=250)

    def run(number: int) -> None:
        with LinuxGuest(GuestConfig(kernel=kernel)) as guest:
            guest.start()
            guest.wait_agent()
            meet.wait()  # both are up
            handle = guest.exec(["sh", "-c", f"sleep 0.5; echo {number}; exit {number}"])
            report = guest.run_to_end(handle)
            results[number] = (handle.stdout, report.outcome)
            meet.wait()

    threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: (f"{n}\n".encode(), Exited(code=n)) for n in (1, 2)}


def test_a_guest_stopped_by_its_owner_says_so_and_leaves_nothing(kernel: Path, mappings: None) -> None:
    with LinuxGuest(GuestConfig(kernel=kernel)) as guest:
        guest.start()
        guest.wait_agent()
        handle = guest.exec(["sleep", "1000"])
        handle.wait_started(PATIENCE_S)
        guest.machine.stop("enough")
        report = guest.run_to_end(handle)
    assert report.outcome == Stopped(detail="enough")


def test_a_fault_of_ours_ends_the_guest_as_such(kernel: Path, mappings: None) -> None:
    fault = RuntimeError("a bug in a device")

    def fail() -> None:
        raise fault

    with LinuxGuest(GuestConfig(kernel=kernel)) as guest:
        guest.start()
        guest.wait_agent()
        handle = guest.exec(["sleep", "1000"])
        handle.wait_started(PATIENCE_S)
        begin = time.monotonic()
        guest.machine.loop.post(fail)
        report = guest.run_to_end(handle)
        assert time.monotonic() - begin < SOON_S
    assert report.outcome == VmmError(error=fault)


def test_a_guest_left_while_it_boots_leaves_nothing(kernel: Path, mappings: None) -> None:
    with LinuxGuest(GuestConfig(kernel=kernel)) as guest:
        guest.start()
        with pytest.raises(BootError, match=r"the guest did not come up within 0\.5 s"):
            guest.wait_agent(0.5)
