"""The root disk as memory: which device it is, and that its block device may be late."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmlite.devices.blk import Disk
from kvmlite.devices.pmem import Pmem
from kvmlite.guest.agent import GuestError
from kvmlite.sandbox import root_disk
from kvmlite.sandbox.root_disk import RootDisk


class PlayedAgent:
    """Mounts what is there by now."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[Any, ...]] = []

    def mount(self, source: str, target: str, kind: str, data: str = "", flags: int = 0, *, name: str = "") -> None:
        self.calls.append((source, target, kind, data, flags))
        if self.errors:
            raise GuestError(f"mounting {source}", self.errors.pop(0))

    def change_root(self, directory: str) -> None:
        self.calls.append((directory,))


MOUNTED = ("/dev/pmem0", "/mnt", "ext4", "dax", 1024)


@pytest.mark.parametrize(("keep", "mode"), [(False, "private"), (True, "shared")])
def test_as_memory_it_is_private_unless_it_is_kept(keep: bool, mode: str) -> None:
    root = RootDisk(path="/image", keep=keep, dax=True)
    (device,) = root.devices
    assert device == Pmem(path="/image", mode=mode)
    assert device.keeps_writes is keep
    assert root.features == ("pmem", "ext4")


def test_as_a_disk_it_is_a_disk() -> None:
    (device,) = RootDisk(path="/image").devices
    assert isinstance(device, Disk)


def test_a_partition_of_it_is_mounted() -> None:
    agent = PlayedAgent()
    RootDisk(path="/image", partition=2, dax=True, keep=True).set_up(agent, [])  # type: ignore[arg-type]
    assert agent.calls == [("/dev/pmem0p2", "/mnt", "ext4", "dax", 0), ("/mnt",)]


def test_a_block_device_that_is_late_is_waited_for() -> None:
    agent = PlayedAgent(errno.ENOENT, errno.ENXIO)
    RootDisk(path="/image", dax=True).set_up(agent, [])  # type: ignore[arg-type]
    assert agent.calls == [MOUNTED, MOUNTED, MOUNTED, ("/mnt",)]


def test_a_guest_that_cannot_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GuestError, match="Invalid argument"):
        RootDisk(path="/image", dax=True).set_up(PlayedAgent(errno.EINVAL), [])  # type: ignore[arg-type]
    monkeypatch.setattr(root_disk, "_DEVICE_TIMEOUT_S", 0.0)
    with pytest.raises(GuestError, match="No such file or directory"):
        RootDisk(path="/image", dax=True).set_up(PlayedAgent(errno.ENOENT), [])  # type: ignore[arg-type]
