"""What a Linux guest does before it is started: no kernel has to boot."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvmlite import ConfigError, GuestConfig, LinuxGuest
from kvmlite.lowlevel import PreparedVm

pytestmark = pytest.mark.kvm

CHANNELS = ["vsock", "console", "serial"]
PROMPT_S = 4.0  # a device loop that does not run is waited for 5 s


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stock kernel with its modules; caches of its own."""
    kernels = os.environ.get("KVMLITE_TEST_KERNELS", "")
    path = os.path.join(kernels, "linux-image-cloud-amd64")
    if not kernels or not os.path.isdir(path):
        pytest.skip("KVMLITE_TEST_KERNELS has no linux-image-cloud-amd64: run scripts/setup kernels")
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path))
    return path


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_kernel_that_does_not_fit_is_the_error_that_is_raised(kernel: str, channel: str) -> None:
    config = GuestConfig(kernel=kernel, memory_mib=48, channel=channel)
    with pytest.raises(ConfigError, match="the guest has 48 MiB"):
        LinuxGuest(config, prepared=PreparedVm())


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_guest_that_was_never_started_closes_at_once(kernel: str, channel: str) -> None:
    guest = LinuxGuest(GuestConfig(kernel=kernel, channel=channel), prepared=PreparedVm())
    start = time.monotonic()
    guest.close()
    assert time.monotonic() - start < PROMPT_S
