from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from support.hostile import HostileChains, check_survives, hostile_chains

from kvmlite._native import ffi
from kvmlite.abi.virtio import DeviceStatus
from kvmlite.devices.pmem import Pmem, VirtioPmem
from kvmlite.errors import ConfigError, HostError, ImageError
from kvmlite.testing import Used, VirtioRig, check_virtio_device

MIB = 1 << 20
FLUSH = b"\0\0\0\0"
TIMEOUT_S = 30.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"first".ljust(5120, b"."))
    return path


@pytest.fixture
def shared(image: Path) -> Iterator[VirtioRig]:
    with VirtioRig(Pmem(path=image, mode="shared").attach) as made:
        made.start()
        yield made


def memory_of(rig: VirtioRig) -> memoryview:
    """What the guest would see; valid while the file is as long as it was."""
    hva, size, _ = rig.mapped[0]
    return memoryview(ffi.buffer(ffi.cast("char *", hva), size)).cast("B")


def wait_used(rig: VirtioRig) -> list[Used]:
    """Used entries, once there are any: the answer comes from another thread."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := rig.queues[0].take_all_used()) and time.monotonic() < deadline:
        time.sleep(0.001)
        rig.loop.run()
    return found


@pytest.mark.parametrize("mode", ["read-only", "private", "shared"])
def test_the_device_conforms(image: Path, mode: str) -> None:
    check_virtio_device(Pmem(path=image, mode=mode).attach)


@pytest.mark.parametrize(("mode", "read_only"), [("read-only", True), ("private", False), ("shared", False)])
def test_the_file_is_mapped_with_zeros_up_to_2_mib(image: Path, mode: str, read_only: bool) -> None:
    with VirtioRig(Pmem(path=image, mode=mode).attach) as rig:
        assert [entry[1:] for entry in rig.mapped] == [(2 * MIB, read_only)]
        assert rig.mapped[0][0] % (2 * MIB) == 0
        assert rig.driver.read_config(0, 16) == (1 << 32).to_bytes(8, "little") + (2 * MIB).to_bytes(8, "little")
        assert bytes(memory_of(rig)) == image.read_bytes().ljust(2 * MIB, b"\0")


@pytest.mark.parametrize(("mode", "kept"), [("private", b"first"), ("shared", b"guest")])
def test_writes_go_to_the_file_only_if_it_is_shared(image: Path, mode: str, kept: bytes) -> None:
    with VirtioRig(Pmem(path=image, mode=mode).attach) as rig:
        memory_of(rig)[:5] = b"guest"
        memory_of(rig)[MIB : MIB + 5] = b"after"
        assert image.read_bytes()[:5] == kept
    assert image.stat().st_size == 5120


@pytest.mark.parametrize("mode", ["read-only", "private"])
def test_a_flush_of_what_is_not_kept_is_answered_at_once(image: Path, mode: str) -> None:
    with VirtioRig(Pmem(path=image, mode=mode).attach) as rig:
        rig.start()
        head = rig.queues[0].add_chain(readable=[FLUSH], writable=[4])
        rig.kick(0)
        used = rig.queues[0].take_used()
        assert used == Used(head, 4)
        assert used is not None
        assert used.data == bytes(4)
        assert rig.take_irq() == 1


def test_a_flush_waits_for_the_disk_and_others_join_the_next(
    shared: VirtioRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, count = threading.Semaphore(0), threading.Semaphore(0), [0]

    def sync(fd: int) -> None:
        count[0] += 1
        entered.release()
        assert go_on.acquire(timeout=TIMEOUT_S)

    monkeypatch.setattr(os, "fdatasync", sync)
    for _ in range(4):
        shared.queues[0].add_chain(readable=[FLUSH], writable=[4])
        shared.kick(0)
        if count[0] == 0:
            assert entered.acquire(timeout=TIMEOUT_S)
    assert shared.queues[0].take_used() is None
    go_on.release()
    assert [used.data for used in wait_used(shared)] == [bytes(4)]
    go_on.release()
    assert len(wait_used(shared)) == 3
    assert count[0] == 2


def test_a_disk_that_fails_is_told_to_the_guest_and_once_to_the_user(
    shared: VirtioRig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    for _ in range(2):
        shared.queues[0].add_chain(readable=[FLUSH], writable=[4])
        shared.kick(0)
        assert [used.data for used in wait_used(shared)] == [b"\1\0\0\0"]
    assert shared.warnings == [f"device0: cannot write to {image}: Input/output error; the guest was told"]


def test_a_flush_that_ends_after_a_reset_touches_no_queue(shared: VirtioRig, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[Callable[[], object]] = []
    done = threading.Event()
    monkeypatch.setattr(shared.loop, "post", lambda function: (posted.append(function), done.set()))
    shared.queues[0].add_chain(readable=[FLUSH], writable=[4])
    shared.kick(0)
    assert done.wait(TIMEOUT_S)
    shared.restart()
    posted[0]()
    assert shared.queues[0].used_idx == 0


def test_an_unknown_request_fails(shared: VirtioRig) -> None:
    for request in (b"\1\0\0\0", b"\0\0", b""):
        shared.queues[0].add_chain(readable=[request] if request else [], writable=[4])
        shared.kick(0)
        assert [used.data for used in shared.queues[0].take_all_used()] == [b"\1\0\0\0"]


def test_a_request_without_room_for_the_answer_ends_in_needs_reset(shared: VirtioRig) -> None:
    shared.queues[0].add_chain(readable=[FLUSH], writable=[3])
    shared.kick(0)
    assert shared.driver.status == 15 | DeviceStatus.NEEDS_RESET


def test_a_file_that_was_cut_short_is_told(image: Path) -> None:
    rig = VirtioRig(Pmem(path=image).attach)
    os.truncate(image, 10)
    rig.close()
    assert rig.warnings == [f"device0: {image} was cut short from 5120 to 10 bytes while the guest had it"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown mode 'rw'; choose one of read-only, private, shared"):
        Pmem(path=tmp_path, mode="rw")
    with pytest.raises(ImageError, match="is neither a file nor a block device"):
        VirtioRig(Pmem(path=tmp_path).attach)
    (tmp_path / "empty").touch()
    with pytest.raises(ImageError, match="empty is empty"):
        VirtioRig(Pmem(path=tmp_path / "empty").attach)


def test_a_shared_file_belongs_to_one_machine(image: Path) -> None:
    with VirtioRig(Pmem(path=image).attach), VirtioRig(Pmem(path=image, mode="private").attach):
        with pytest.raises(HostError, match="is in use: another virtual machine, or another disk of this one, uses it"):
            VirtioRig(Pmem(path=image, mode="shared").attach)
    with VirtioRig(Pmem(path=image, mode="shared").attach):
        with pytest.raises(
            HostError, match="is in use: another virtual machine, or another disk of this one, writes to it"
        ):
            VirtioRig(Pmem(path=image).attach)


def test_a_guest_without_room_for_it_leaves_nothing_open(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rig: VirtioRig, hva: int, size: int, *, read_only: bool) -> int:
        raise HostError("no slot")

    monkeypatch.setattr(VirtioRig, "_map_memory", refuse)
    with pytest.raises(HostError, match="no slot"):
        VirtioRig(Pmem(path=image, mode="shared").attach)


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_hostile_chains_do_no_harm(image: Path, mode: str) -> None:
    with VirtioRig(Pmem(path=image, mode=mode).attach) as rig:
        assert isinstance(rig.device, VirtioPmem)

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(hostile_chains)
        def offer(chains: HostileChains) -> None:
            check_survives(rig, 0, chains)

        offer()
