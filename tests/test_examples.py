"""The programs in examples/ do what they say. Those that boot Linux: tests/guest/test_examples.py."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support.requirements import ROOT

import kvmlite

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BARE = ("bare_guest.py", "many_machines.py")
LINUX = ("run_command.py", "watch_boot.py")  # tests/guest/test_examples.py

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)


def run_example(name: str) -> str:
    """What it prints; warnings, leaks of files among them, are errors."""
    command = [sys.executable, "-X", "dev", "-W", "error", str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_example_has_a_test() -> None:
    assert [path.name for path in EXAMPLES] == sorted((*BARE, *LINUX))


@each_example
def test_examples_use_public_names_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    used = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvmlite")
        for alias in node.names
    }
    used |= {
        ("kvmlite", node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kvmlite"
    }
    assert used
    public = {("kvmlite", name) for name in kvmlite.__all__}
    assert {entry for entry in used if not str(entry[0]).startswith("kvmlite.testing")} <= public


@pytest.mark.kvm
def test_bare_guest_prints_outcome_time_and_console() -> None:
    first, second = run_example("bare_guest.py").splitlines()
    assert first.startswith("Exited(code=43, signal=0) after ")
    assert second == r"console: b'hi\n'; exits: {'KVM_EXIT_IO': 4}"


@pytest.mark.kvm
def test_many_machines_end_stopped_by_their_callers() -> None:
    lines = run_example("many_machines.py").splitlines()
    assert [line.split(":")[0] for line in lines] == ["Stopped(detail='seen enough')"] * 4
