"""The programs in examples/ that boot Linux."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.requirements import ROOT

pytestmark = pytest.mark.guest


def run_example(name: str) -> str:
    """What it prints, with the lab's cloud kernel where there is one, else with the store's default."""
    kernels = os.environ.get("KVMLITE_TEST_KERNELS")
    kernel = [os.path.join(kernels, "linux-image-cloud-amd64")] if kernels else []
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name), *kernel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.timeout(330)
def test_run_command_tells_output_status_and_panic() -> None:
    uname, status, panic = run_example("run_command.py").splitlines()
    assert uname.startswith("Linux kvmlite ")
    assert status == r"stdout '5\n', exit code 3, ok: False"
    assert panic.startswith("the kernel panicked; exit code None, ")


@pytest.mark.timeout(330)
def test_watch_boot_runs_two_commands_in_one_guest_and_lists_its_stages() -> None:
    lines = run_example("watch_boot.py").splitlines()
    assert lines[:4] == ["line 1", "line 2", "line 3", "virtio_rng.0"]
    stages = [line[:16].strip() for line in lines[4:-1]]
    assert stages == [
        "kvm ready", "kernel loaded", "first KVM_RUN", "kernel entry", "init", "agent ready", "first result", "ended",
    ]  # fmt: skip
