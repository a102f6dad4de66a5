"""Run commands in turn and compare them pair by pair."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Run = Callable[[], "Sample"]

QEMU_BARE_CPU = "host,-arch-capabilities"
"""QEMU's processor beside a bare guest: it aborts where a software KVM offers IA32_ARCH_CAPABILITIES and then refuses to set it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run: wall seconds and peak resident memory of its largest process, MiB."""

    wall_s: float
    peak_mib: float = 0.0


class MeasureError(Exception):
    """A command did not do what it was measured for."""


def run_process(command: Sequence[str], *, expect: int) -> Sample:
    """From exec to exit of one process.

    Peak memory is what the kernel accounts to the finished process; it is never below this script's own (about 11 MiB),
    from which the process is started.

    Raises:
        MeasureError: It ended with another status.
    """
    null = os.open(os.devnull, os.O_RDWR)
    try:
        start = time.monotonic()
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)]
        pid = os.posix_spawnp(command[0], list(command), dict(os.environ), file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
        wall = time.monotonic() - start
    finally:
        os.close(null)
    code = os.waitstatus_to_exitcode(status)
    if code != expect:
        raise MeasureError(f"{' '.join(command)}: exit status {code}, expected {expect}")
    return Sample(wall_s=wall, peak_mib=usage.ru_maxrss / 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Samples of two competitors, taken in turn."""

    names: tuple[str, str]
    ours: list[Sample]
    theirs: list[Sample]

    def ratio(self, of: Callable[[Sample], float]) -> float:
        """Median of ours over theirs, pair by pair."""
        return statistics.median(of(a) / of(b) for a, b in zip(self.ours, self.theirs, strict=True))

    def print_table(self) -> None:
        """Median, minimum, maximum of each figure, then the ratios."""
        print(f"{'':<24}{'median':>10}{'min':>10}{'max':>10}")
        for name, samples in zip(self.names, (self.ours, self.theirs), strict=True):
            _row(f"{name} wall ms", [sample.wall_s * 1e3 for sample in samples])
            if any(sample.peak_mib for sample in samples):
                _row(f"{name} peak MiB", [sample.peak_mib for sample in samples])
        ratios = [a.wall_s / b.wall_s for a, b in zip(self.ours, self.theirs, strict=True)]
        _row("wall ratio", ratios, digits=2)
        if self.ours[0].peak_mib:
            _row("peak ratio", [a.peak_mib / b.peak_mib for a, b in zip(self.ours, self.theirs, strict=True)], digits=2)


def _row(name: str, values: Sequence[float], digits: int = 1) -> None:
    print(f"{name:<24}{statistics.median(values):>10.{digits}f}{min(values):>10.{digits}f}{max(values):>10.{digits}f}")


def compare(names: tuple[str, str], ours: Run, theirs: Run, runs: int, *, warmups: int = 1) -> Comparison:
    """Alternate the two, ``runs`` times each after ``warmups`` that do not count."""
    for _ in range(warmups):
        ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return Comparison(names=names, ours=[a for a, _ in pairs], theirs=[b for _, b in pairs])


def print_figures(name: str, values: Sequence[float]) -> None:
    """One row without a competitor."""
    _row(name, values, digits=2)
