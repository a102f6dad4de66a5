"""What is ours of a vhost device, with the kernel's side played: addresses, the order of things, broken rings.

The real one is in ``tests/guest/test_vhost_vsock.py``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmlite.abi.virtio import DeviceStatus
from kvmlite.devices.vsock import Vsock, vhost
from kvmlite.devices.vsock.vhost import VhostVsock
from kvmlite.errors import ConfigError, HostError
from kvmlite.host.vhost import VhostRing
from kvmlite.testing import VirtioRig


class PlayedVhost:
    """Takes requests as the kernel does and notes them."""

    taken: set[int]
    failing: str

    def __init__(self, path: str) -> None:
        self.calls: list[str] = []
        self.rings: dict[int, VhostRing] = {}
        self.is_closed = False

    def _note(self, call: str) -> None:
        assert not self.is_closed, f"{call} after close"
        self.calls.append(call)
        if call == self.failing:
            raise HostError(f"{call}: No such device", errno.ENODEV)

    def features(self) -> int:
        return 1 << 32 | 1 << 29 | 1 << 28 | 1 << 1 | 1

    def set_guest_cid(self, cid: int) -> None:
        self._note("cid")
        if cid in self.taken:
            raise HostError("taken", errno.EADDRINUSE)

    def set_features(self, features: int) -> None:
        self._note(f"features {features:#x}")

    def set_memory(self, regions: Iterator[tuple[int, int, int]]) -> None:
        assert [(gpa, size) for gpa, size, _ in regions] == [(0, 8 << 20)]
        self._note("memory")

    def set_ring(self, index: int, ring: VhostRing) -> None:
        self._note(f"ring {index}")
        self.rings[index] = ring

    def set_vsock_running(self, is_running: bool) -> None:
        self._note("run" if is_running else "stop")

    def release_ring(self, index: int) -> int:
        self._note(f"release {index}")
        return 0

    def close(self) -> None:
        self.is_closed = True


STARTED = ["features 0x110000002", "memory", "ring 0", "ring 1", "run"]
STOPPED = ["stop", "release 0", "release 1"]


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost, "Vhost", PlayedVhost)
    monkeypatch.setattr(PlayedVhost, "taken", set(), raising=False)
    monkeypatch.setattr(PlayedVhost, "failing", "", raising=False)


@pytest.fixture
def rig() -> Iterator[VirtioRig]:
    with VirtioRig(Vsock(backend="vhost").attach) as made:
        yield made


def kernel_of(rig: VirtioRig) -> PlayedVhost:
    assert isinstance(rig.device, VhostVsock)
    assert isinstance(rig.device._vhost, PlayedVhost)
    return rig.device._vhost


def test_a_taken_address_is_refused_unless_any_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    PlayedVhost.taken = {70000}
    with pytest.raises(HostError, match="device0: another guest of this host has the vsock address 70000"):
        VirtioRig(Vsock(backend="vhost", cid=70000).attach)
    picks = iter([70000, 70000, 70001])
    monkeypatch.setattr(vhost.random, "choice", lambda choices: next(picks))
    with VirtioRig(Vsock(backend="vhost").attach) as rig:
        assert rig.driver.read_config(0, 8) == (70001).to_bytes(8, "little")
        assert kernel_of(rig).calls == ["cid"] * 3


def test_the_kernel_gets_the_queues_and_gives_them_back(rig: VirtioRig) -> None:
    kernel = kernel_of(rig)
    kernel.calls.clear()
    for _ in range(2):
        rig.start()
        assert kernel.calls == STARTED
        assert [kernel.rings[index].size for index in (0, 1)] == [16, 16]
        assert kernel.rings[0].call_fd == rig.irq_eventfd
        assert os.eventfd_read(kernel.rings[1].kick_fd) == 1  # for what was there before the driver was up
        rig.driver.reset()
        assert kernel.calls == STARTED + STOPPED
        kernel.calls.clear()


def test_a_driver_that_sets_up_no_queues_is_left_alone(rig: VirtioRig) -> None:
    kernel_of(rig).calls.clear()
    assert rig.driver.negotiate()
    rig.driver.add_status(DeviceStatus.DRIVER_OK)
    rig.driver.reset()
    assert kernel_of(rig).calls == []


def test_rings_the_kernel_cannot_follow_end_in_needs_reset_and_a_reset_mends_it(rig: VirtioRig) -> None:
    rig.start()
    os.eventfd_write(kernel_of(rig).rings[1].error_fd, 1)
    rig.loop.run()
    assert rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert "queue 1: the host's kernel cannot follow its rings" in rig.transport.statistics().last_fault
    rig.restart()
    assert rig.driver.status == 15


def test_a_host_that_fails_is_no_fault_of_the_guest(rig: VirtioRig) -> None:
    PlayedVhost.failing = "run"
    rig.start()
    assert [str(error) for error in rig.errors] == ["run: No such device"]
    rig.errors.clear()


def test_after_the_end_of_the_guest_nothing_is_asked_of_the_kernel(rig: VirtioRig) -> None:
    rig.start()
    kernel = kernel_of(rig)
    kernel.calls.clear()
    assert isinstance(rig.device, VhostVsock)
    rig.device.hang_up()
    assert kernel.calls == STOPPED
    assert not kernel.is_closed  # readers on the loop come first
    rig.loop.run()
    assert kernel.is_closed
    rig.driver.reset()
    assert kernel.calls == STOPPED


def test_what_the_guest_has_sent_is_waited_for(rig: VirtioRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.start()
    rig.queues[1].add_chain(readable=[b"last words"])
    kernel, slept = kernel_of(rig), []
    monkeypatch.setattr(vhost.time, "sleep", lambda seconds: slept.append(list(kernel.calls)))
    monkeypatch.setattr(vhost, "DRAIN_TIMEOUT_S", 0.005)
    assert isinstance(rig.device, VhostVsock)
    rig.device.hang_up()
    assert slept
    assert "stop" not in slept[-1]
    assert "stop" in kernel.calls


def test_the_spec_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'kernel'; choose one of user, vhost"):
        Vsock(backend="kernel")
    with pytest.raises(ConfigError, match="uds_path means nothing with backend 'vhost'"):
        Vsock(backend="vhost", uds_path="/tmp/x")
