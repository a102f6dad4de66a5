"""What a bare start loads: docs/architecture.md, "Rules of the start path"."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import _cffi_backend
import pytest
from support.requirements import ROOT

pytestmark = pytest.mark.kvm

FORBIDDEN = [
    "dataclasses",
    "inspect",
    "typing",
    "re",
    "enum",
    "pathlib",
    "contextlib",
    "click",
    "socket",
    "subprocess",
    "signal",
    "selectors",
    "logging",
    "tempfile",
    "json",
]

# Runs argv, then prints what has been imported, and where from the first forbidden module came.
PROBE = """
import sys
from kvmlite.cli.main import main
code = main(sys.argv[1:])
loaded = sorted(sys.modules)
import json
json.dump([code, loaded], sys.stdout)
"""


def start(*arguments: str) -> tuple[int, list[str]]:
    """Run the command line in a Python that has loaded nothing of its own accord; exit code and modules."""
    path = os.pathsep.join([str(ROOT / "src"), str(Path(_cffi_backend.__file__).parent)])
    result = subprocess.run(
        [sys.executable, "-S", "-c", PROBE, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    code, modules = json.loads(result.stdout)
    return code, modules


def test_a_bare_run_imports_nothing_it_does_not_need(assemble: Callable[[str], Path]) -> None:
    code, modules = start("run", "--bare", "--kernel", str(assemble("debug_exit 10")))
    assert code == 21
    assert "kvmlite.machine.machine" in modules
    assert [name for name in FORBIDDEN if name in modules] == []


def test_a_bare_run_with_its_usual_options_imports_nothing_more(assemble: Callable[[str], Path]) -> None:
    kernel = str(assemble("debug_exit 10"))
    code, modules = start("run", "--bare", "--kernel", kernel, "--memory", "64M", "--timeout", "10s", "--append", "a=b")
    assert code == 21
    assert [name for name in FORBIDDEN if name in modules] == []


def test_a_bare_run_stays_small(assemble: Callable[[str], Path]) -> None:
    _, modules = start("run", "--bare", "--kernel", str(assemble("debug_exit 10")))
    ours = [name for name in modules if name.startswith("kvmlite")]
    others = [name for name in modules if not name.startswith("kvmlite") and name not in sys.builtin_module_names]
    assert not [name for name in ours if name.startswith(("kvmlite.virtio", "kvmlite.sandbox", "kvmlite.images"))]
    assert len(others) < 30, others


def test_importing_the_package_loads_none_of_its_products() -> None:
    probe = "import sys, kvmlite; print(*sorted(name for name in sys.modules if name.startswith('kvmlite')))"
    env = {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, "-S", "-c", probe], capture_output=True, text=True, env=env, check=True)
    assert result.stdout.split() == ["kvmlite"]
