"""How a machine ended, as a type and as a line for people."""

from __future__ import annotations

import typing

import pytest

from kvmlite.machine import outcome as outcomes
from kvmlite.machine.outcome import (
    Exited,
    ExitReport,
    Hung,
    Lost,
    MachineStatistics,
    Panicked,
    PoweredOff,
    Reset,
    Stopped,
    TimedOut,
    TripleFault,
    VmmError,
    describe,
)

LINES = [
    (Exited(code=0), "exited with status 0"),
    (Exited(code=255), "exited with status 255"),
    (Exited(code=137, signal=9), "was killed by signal 9"),
    (PoweredOff(), "the guest powered off"),
    (Reset(), "the guest asked for a reset"),
    (Panicked(), "the guest kernel panicked"),
    (TripleFault(vcpu_id=3), "triple fault on vCPU 3"),
    (TimedOut(limit_s=2.5), "ran into the time limit of 2.5 s"),
    (Hung(detail="every vCPU is halted"), "the guest hangs: every vCPU is halted"),
    (Lost(detail="the agent went away"), "lost the guest: the agent went away"),
    (VmmError(error=RuntimeError("bug")), "the machine failed: bug"),
    (Stopped(), "stopped"),
    (Stopped(detail="by the user"), "stopped: by the user"),
]


@pytest.mark.parametrize(("outcome", "line"), LINES)
def test_each_outcome_has_a_line(outcome: outcomes.Outcome, line: str) -> None:
    assert describe(outcome) == line


def test_no_outcome_is_without_a_line() -> None:
    assert {type(outcome) for outcome, _ in LINES} == set(typing.get_args(outcomes.Outcome))


@pytest.mark.parametrize(("outcome", "line"), LINES)
def test_only_exited_has_an_exit_code(outcome: outcomes.Outcome, line: str) -> None:
    report = ExitReport(outcome=outcome, console=b"", spans={}, statistics=MachineStatistics())
    assert report.exit_code == (outcome.code if isinstance(outcome, Exited) else None)


def test_statistics_begin_at_nothing() -> None:
    statistics = MachineStatistics()
    assert (statistics.exits, statistics.python_exits, statistics.serial_bytes) == (0, 0, 0)
    assert statistics.exits_by_reason == {}
    assert statistics.addresses == ()
