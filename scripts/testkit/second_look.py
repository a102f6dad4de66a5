"""Run pytest; when a few tests fail, run just those again, once.

Usage: python scripts/testkit/second_look.py [PYTEST_ARGUMENT...]

The tests run on emulated hosts and on machines that they share with others, where now and then one fails by chance. A test
that fails again fails the run. One that passes is named on a line of its own, does not fail the run, and wants mending:

    unsteady: tests/unit/test_it.py::test_this failed once and passed when run again

There is no second look when more than MOST tests fail, when files cannot be collected, when pytest crashes or is
interrupted, or when the arguments use pytest's cache. The last line is pytest's, counted over both runs; what is unsteady
is among what passed. Exit status: pytest's, 0 if each test that failed passed when run again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

MOST = 3
"""Failed tests; more than these have a reason."""

TESTS_FAILED = 1
"""Exit status of a pytest that ran to its end, with failures."""

CACHE = ".pytest_cache"
CACHE_OPTIONS = (
    "--lf",
    "--last-failed",
    "--ff",
    "--failed-first",
    "--nf",
    "--new-first",
    "--sw",
    "--stepwise",
    "--cache",
)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Tests of one run; whose set-up or clean-up fails has failed."""

    failed: int
    passed: int
    skipped: int
    xfailed: int


def count(report: Path) -> Counts:
    """Count what is in a JUnit XML report; a test with two failures is in it twice."""
    outcomes: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = (case.get("classname", ""), case.get("name", ""))
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes[name] = "failed"
        elif skipped is not None:
            outcomes.setdefault(name, "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped")
        else:
            outcomes.setdefault(name, "passed")
    found = list(outcomes.values())
    return Counts(**{name: found.count(name) for name in ("failed", "passed", "skipped", "xfailed")})


def run_pytest(*arguments: str) -> int:
    """Run it, shown; its exit status, 128 + signal if one ended it."""
    status = subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode
    return status if status >= 0 else 128 - status


def failed_tests() -> set[str]:
    """Ids of the tests that failed, as pytest's cache has them."""
    try:
        return set(json.loads(Path(CACHE, "v/cache/lastfailed").read_text()))
    except FileNotFoundError:  # none failed
        return set()


def closing_line(counts: Counts, unsteady: int, duration_s: float) -> str:
    """Pytest's last line, for both runs together."""
    passed = counts.passed + unsteady
    numbers = (
        (counts.failed - unsteady, "failed"), (passed, "passed"), (unsteady, "unsteady"), (counts.skipped, "skipped"),
        (counts.xfailed, "xfailed"),
    )  # fmt: skip
    text = ", ".join(f"{number} {name}" for number, name in numbers if number)
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f" ({hours}:{minutes:02}:{seconds:02})" if duration_s >= 60 else ""
    return f" {text} in {duration_s:.2f}s{clock} ".center(80, "=")


def main(arguments: Sequence[str]) -> int:
    """Run pytest, and what failed again."""
    signal.signal(signal.SIGINT, lambda *_: None)  # pytest gets it, too, and ends
    if any(argument.startswith(CACHE_OPTIONS) for argument in arguments):
        return run_pytest(*arguments)
    with tempfile.TemporaryDirectory() as directory:
        reports = [Path(directory, f"{number}.xml") for number in range(2)]
        cache = f"--override-ini=cache_dir={CACHE}"
        begin = time.monotonic()
        status = run_pytest(cache, "--cache-clear", f"--junitxml={reports[0]}", *arguments)
        if status != TESTS_FAILED or not 0 < len(failed := failed_tests()) <= MOST or not reports[0].exists():
            return status
        print(f"\nsecond look: running again what failed, {len(failed)} of at most {MOST}", flush=True)
        again = run_pytest(
            cache, "--last-failed", "--last-failed-no-failures=none", f"--junitxml={reports[1]}", *arguments
        )
        unsteady = sorted(failed - failed_tests())
        if again not in (0, TESTS_FAILED) or count(reports[1]).passed != len(unsteady):
            unsteady = []  # the second look went wrong, or skipped one: it says nothing
        print()
        for test in unsteady:
            print(f"unsteady: {test} failed once and passed when run again")
        print(closing_line(count(reports[0]), len(unsteady), time.monotonic() - begin), flush=True)
        return 0 if len(unsteady) == len(failed) else TESTS_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
