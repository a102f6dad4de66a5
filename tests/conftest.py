"""Rules that hold for every test: what it needs is there or it is skipped by name, and it leaves nothing behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support.leaks import Holdings
from support.programs import Assembler
from support.requirements import REQUIREMENTS, lack, required

# Property tests look at the same examples each time, and give no verdict on how fast this host is today;
# --hypothesis-profile=random searches anew.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a KVMLITE_REQUIRE that would require nothing because of a typing error."""
    try:
        required()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    # A shell starts background jobs with SIGINT ignored, nohup with SIGHUP; the commands under test would inherit that.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or with KVMLITE_REQUIRE fail, a test whose needs are not met."""
    for marker, missing in REQUIREMENTS.items():
        if item.get_closest_marker(marker) is None:
            continue
        if reason := missing():
            lack(marker, reason)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaks a descriptor, a thread or a child (and mappings, if it asks for ``mappings``)."""
    before = Holdings(mappings="mappings" in request.fixturenames)
    yield
    gains = before.gains()
    if gains:
        pytest.fail("left behind: " + "; ".join(f"{kind} {things}" for kind, things in gains.items()), pytrace=False)


@pytest.fixture
def mappings() -> None:
    """Ask the leak check to look at memory mappings, too."""


@pytest.fixture
def loop() -> Iterator[Any]:
    """A running device loop on which no callback may raise."""
    from kvmlite.host.loop import DeviceLoop

    errors: list[BaseException] = []
    device_loop = DeviceLoop(errors.append)
    device_loop.start()
    device_loop.call(lambda: None)  # its thread has its name by now
    yield device_loop
    device_loop.stop()
    assert errors == []


@pytest.fixture(scope="session")
def assemble(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Turn assembly text into a PVH kernel; the same text is assembled once per session."""
    return Assembler(tmp_path_factory.mktemp("guests"))


@pytest.fixture
def run_guest(assemble: Callable[[str], Path]) -> Callable[..., Any]:
    """Run a guest to its end: ``run_guest(source, timeout_s=60, memory_mib=16, ...) -> ExitReport``."""
    from support.machines import run_to_end

    def run(source: str, *, timeout_s: float = 60.0, **config: Any) -> Any:
        return run_to_end(assemble(source), timeout_s=timeout_s, **config)

    return run
