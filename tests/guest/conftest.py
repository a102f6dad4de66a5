"""Linux guests: where their kernels come from, and what takes longer in the lab.

``KVMLITE_TEST_KERNELS`` names a directory with one unpacked package per subdirectory (the lab sets it; ``scripts/setup
kernels`` fills it). The initramfs and the unpacked kernel are made by the first boot of each kernel and kept for all
tests of the session in one KVMLITE_HOME, so tests of the same kernel share that cost.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import requirements
from support.command import Command, Ended

IS_LAB = os.environ.get("KVMLITE_LAB") == "1"

# In the lab everything runs 20 to 50 times slower, the host side included (a Python process takes 0.5 s to end), and
# other labs may run beside it on the same two cores. Limits of host time are stretched by this much there.
STRETCH = 6.0 if IS_LAB else 1.0

HANG_TIMEOUT_S = 250
SOON_S = 120.0 if IS_LAB else 30.0  # below HANG_TIMEOUT_S, which is another way to end
"""Within which an end is reported, from the event in the guest to the end of the command on the host."""

PACKAGES = {
    "6.1-cloud": "linux-image-cloud-amd64",
    "6.1": "linux-image-amd64",
    "6.12-cloud": "linux-image-6.12-cloud-amd64",
    "6.1-rt": "linux-image-rt-amd64",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A boot takes seconds, under load in the lab more than ten times that."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.guest)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))


def kernel_package(name: str) -> Path:
    """The unpacked package of a kernel; a test that needs one that is not there is skipped."""
    path = requirements.kernel_package(PACKAGES[name])
    if not path.is_dir():
        requirements.lack("kernels", f"no {path}: scripts/setup kernels {PACKAGES[name]}")
    return path


@pytest.fixture(scope="session")
def kernels() -> Callable[[str], Path]:
    """``kernels("6.1-cloud")``: path of the unpacked package."""
    return kernel_package


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The kernel of tests that would do with any."""
    return kernel_package("6.1-cloud")


@pytest.fixture(scope="session")
def session_command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="session", autouse=True)
def kvmlite_home(session_command: Command) -> Iterator[Path]:
    """The same store and caches for the command and for guests of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMLITE_HOME", str(session_command.home))
        yield session_command.home


@pytest.fixture
def kvmlite(session_command: Command) -> Iterator[Command]:
    """Runs the command; whatever the test did, no process and no file may be left."""
    yield session_command
    assert session_command.remains() == []


@pytest.fixture(scope="session")
def debian(kvmlite_home: Path) -> str:
    """The image that ``scripts/setup images`` has made; a test that needs it is skipped without it."""
    if missing := requirements.images_missing():
        requirements.lack("images", missing)
    link = requirements.debian_image()
    names = kvmlite_home / "images/names"
    names.mkdir(parents=True, exist_ok=True)
    (names.parent / link.resolve().name).symlink_to(link.resolve())
    (names / "debian").symlink_to(f"../{link.resolve().name}")
    return "debian"


@dataclass(frozen=True, kw_only=True)
class TimedEnd:
    """A run whose guest printed a line and was told to go on to the event.

    Attributes:
        seconds: From that line's arrival to the end of the command.
    """

    ended: Ended
    seconds: float


@pytest.fixture
def run_to_event(kvmlite: Command, kernel: Path) -> Callable[..., TimedEnd]:
    """``run_to_event(script, *options)``: run a guest's shell script that prints ``now`` and waits for a line.

    The line comes when ``now`` has arrived here: nothing of it is lost with the guest.
    """

    def run(script: str, *options: str, timeout_s: float = 200.0) -> TimedEnd:
        if "--hang-timeout" not in options:
            options = ("--hang-timeout", str(HANG_TIMEOUT_S), *options)
        process = kvmlite.start("run", "--kernel", kernel, *options, "--", "sh", "-c", script, stdin=subprocess.PIPE)
        assert process.stdout is not None
        line = process.stdout.readline()
        begin = time.monotonic()
        ended = kvmlite.finish(process, timeout_s=timeout_s, input=b"go on\n")
        assert line == b"now\n", ended
        return TimedEnd(ended=ended, seconds=time.monotonic() - begin)

    return run
