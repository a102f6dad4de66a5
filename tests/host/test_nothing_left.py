"""Machines with all that the host can give them come and go, some by SIGKILL, and the host is as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.requirements import ROOT

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.tools]

MACHINES = int(os.environ.get("KVMLITE_LOADED_MACHINES", "8"))


@pytest.mark.timeout(200 + 10 * MACHINES)
def test_machines_with_disks_networks_and_directories_leave_nothing_on_the_host(
    assemble: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("disk", "other"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 20)
    (tmp_path / "tmp").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}/src:{ROOT}/tests",
        "KVMLITE_HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    program = ROOT / "tests/support/loaded_machines.py"
    kernel = assemble("mov $20000, %ecx; 1: loop 1b; debug_exit 0")
    command = ["unshare", "--net", sys.executable, program, kernel, tmp_path, str(MACHINES)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert after == before
    assert before["rules"] == []
    assert before["processes"] == []
    assert before["interfaces"] in (["lo:"], ["lo:", "bridge0:"])
    assert not [path for path in after["files"] if path not in ("disk", "other", "home/run/network/lock")]
