"""What a Linux guest does before it is started: no kernel has to boot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.requirements import kernel_package

from kvmlite import ConfigError, GuestConfig, LinuxGuest
from kvmlite.host.loop import DeviceLoop
from kvmlite.lowlevel import PreparedVm

pytestmark = [pytest.mark.kvm, pytest.mark.kernels]

CHANNELS = ["vsock", "console", "serial"]


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stock kernel with its modules; caches of its own."""
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path))
    return str(kernel_package("linux-image-cloud-amd64"))


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_kernel_that_does_not_fit_is_the_error_that_is_raised(kernel: str, channel: str) -> None:
    config = GuestConfig(kernel=kernel, memory_mib=48, channel=channel)
    with pytest.raises(ConfigError, match="the guest has 48 MiB"):
        LinuxGuest(config, prepared=PreparedVm())


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_guest_that_was_never_started_closes_at_once(
    kernel: str, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = LinuxGuest(GuestConfig(kernel=kernel, channel=channel), prepared=PreparedVm())
    waited: list[float] = []
    call = DeviceLoop.call

    def note(loop: DeviceLoop, function: Callable[[], Any], timeout_s: float = 5.0) -> Any:
        waited.append(timeout_s)
        return call(loop, function, timeout_s)

    monkeypatch.setattr(DeviceLoop, "call", note)
    guest.close()
    assert waited == []  # a loop that does not run answers nobody
