"""scripts/testkit/second_look.py: what failed by chance is told from what fails, and everybody is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.requirements import ROOT

# Each test's own file says whether it has run before.
HEAD = """
import os
import pathlib

import pytest


def is_first(name):
    try:
        pathlib.Path(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def test_good():
    pass
"""
ONCE = """
@pytest.mark.parametrize("text", ["of two words"])
def test_once(text):
    assert not is_first("once")
"""
ALWAYS = "def test_always(): assert False\n"
UNCLEAN_ONCE = """
@pytest.fixture
def unclean():
    yield
    assert not is_first("unclean")


def test_unclean_once(unclean):
    pass
"""


def look(directory: Path, *tests: str, arguments: tuple[str, ...] = ()) -> tuple[int, list[str], int]:
    """Run a file of such tests; exit status, the lines it printed, and how often pytest ran."""
    (directory / "test_it.py").write_text("\n\n".join((HEAD, *tests)))
    command = [sys.executable, str(ROOT / "scripts/testkit/second_look.py"), f"--rootdir={directory}", *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        timeout=100,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stdout.count("test session starts")


def unsteady(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("unsteady")]


def test_what_passes_when_run_again_is_named_and_fails_nothing(tmp_path: Path) -> None:
    skipped = "def test_skipped(): pytest.skip('not here')\n"
    expected = "@pytest.mark.xfail\ndef test_expected(): assert False\n"
    status, lines, runs = look(tmp_path, ONCE, UNCLEAN_ONCE, skipped, expected)
    assert (status, runs) == (0, 2)
    assert unsteady(lines) == [
        "unsteady: test_it.py::test_once[of two words] failed once and passed when run again",
        "unsteady: test_it.py::test_unclean_once failed once and passed when run again",
    ]
    assert re.fullmatch(r"=+ 3 passed, 2 unsteady, 1 skipped, 1 xfailed in \d+\.\d\ds =+", lines[-1])


def test_what_fails_again_fails_the_run(tmp_path: Path) -> None:
    status, lines, runs = look(tmp_path, ONCE, ALWAYS)
    assert (status, runs) == (1, 2)
    assert unsteady(lines) == ["unsteady: test_it.py::test_once[of two words] failed once and passed when run again"]
    assert re.fullmatch(r"=+ 1 failed, 2 passed, 1 unsteady in \d+\.\d\ds =+", lines[-1])


def test_what_is_skipped_the_second_time_has_not_passed(tmp_path: Path) -> None:
    status, lines, runs = look(tmp_path, "def test_fails(): is_first('it') or pytest.skip('not now'); assert False\n")
    assert (status, runs) == (1, 2)
    assert unsteady(lines) == []
    assert re.fullmatch(r"=+ 1 failed, 1 passed in \d+\.\d\ds =+", lines[-1])


@pytest.mark.parametrize(
    ("tests", "arguments", "status"),
    [
        ("", (), 0),
        ("@pytest.mark.parametrize('n', range(4))\ndef test_many(n): assert not is_first(str(n))\n", (), 1),
        ("raise RuntimeError", (), 2),
        ("def test_crash(): os._exit(99)\n", (), 99),
        ("def test_crash(): os.kill(os.getpid(), 9)\n", (), 137),
        (ONCE, ("-k", "no_such_test"), 5),
        (ONCE, ("--last-failed",), 1),
    ],
    ids=["passed", "many", "collection", "exit", "signal", "none", "cache"],
)
def test_there_is_no_second_look(tmp_path: Path, tests: str, arguments: tuple[str, ...], status: int) -> None:
    found, lines, runs = look(tmp_path, tests, arguments=arguments)
    assert (found, unsteady(lines), runs) == (status, [], 1)
