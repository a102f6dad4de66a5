"""virtio-blk with a driver in front and a real file behind."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from struct import Struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hostile import HostileChains, check_survives, hostile_chains
from support.leaks import open_descriptors
from support.requirements import lack

from kvmlite import Disk
from kvmlite._native import ffi, lib
from kvmlite.abi import virtio_blk as abi
from kvmlite.abi.virtio import VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY, DeviceStatus
from kvmlite.errors import ConfigError, HostError, ImageError
from kvmlite.host.disk import DiskFile
from kvmlite.testing import Used, VirtioRig, check_virtio_device
from kvmlite.testing.conformance import ATTACKS

SECTORS = 2048
OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP
Rigger = Callable[..., VirtioRig]


def pattern(size: int, salt: int = 1) -> bytes:
    return Struct("<I").pack(salt * 2654435761 & 0xFFFFFFFF) * (size // 4)


def header(kind: int, sector: int = 0) -> bytes:
    return abi.VIRTIO_BLK_OUTHDR.pack(kind, 0, sector)


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    return abi.VIRTIO_BLK_DISCARD_WRITE_ZEROES.pack(sector, count, flags)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(SECTORS * 512))
    return path


@pytest.fixture
def attach(image: Path) -> Iterator[Rigger]:
    """Bring a driver up on a disk."""
    with ExitStack() as stack:

        def start(features: int | None = None, rig: dict[str, Any] | None = None, **spec: Any) -> VirtioRig:
            disk = Disk(path=str(image), **spec)
            made = stack.enter_context(VirtioRig(disk.attach, **(rig or {})))
            made.start(features)
            return made

        yield start


def submit(
    rig: VirtioRig, kind: int, sector: int = 0, *, data: bytes = b"", room: int = 0, queue: int = 0
) -> tuple[int, bytes]:
    """One request, alone; returns its status and what it stored before that."""
    ring = rig.queues[queue]
    status_gpa = ring.allocate(b"\xee")
    buffers = [(ring.allocate(part), len(part), 0) for part in (header(kind, sector), data)]
    if room:
        buffers.append((ring.allocate(bytes(room)), room, VRING_DESC_F_WRITE))
    ring.add_buffers([*buffers, (status_gpa, 1, VRING_DESC_F_WRITE)])
    rig.kick(queue)
    used = ring.take_used()
    assert used is not None, "no answer"
    status = rig.memory.read(status_gpa, 1)[0]
    return status, used.data[:-1] if used.written == room + 1 else used.data


def read(rig: VirtioRig, sector: int, size: int, queue: int = 0) -> tuple[int, bytes]:
    return submit(rig, abi.VIRTIO_BLK_T_IN, sector, room=size, queue=queue)


def write(rig: VirtioRig, sector: int, data: bytes, queue: int = 0) -> int:
    return submit(rig, abi.VIRTIO_BLK_T_OUT, sector, data=data, queue=queue)[0]


def test_the_device_conforms(image: Path) -> None:
    check_virtio_device(Disk(path=str(image), queues=2).attach)


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_on_the_ring_ends_in_needs_reset(attach: Rigger, name: str) -> None:
    rig = attach()
    ATTACKS[name](rig.queues[0])
    rig.kick(0)
    assert rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    rig.restart()
    assert read(rig, 0, 512)[0] == OK
    assert rig.errors == []


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_what_is_written_is_read_back_and_is_in_the_image(
    attach: Rigger, image: Path, indirect: bool, event_idx: bool
) -> None:
    rig = attach(rig={"indirect": indirect, "event_idx": event_idx})
    data = pattern(4096, salt=7)
    assert write(rig, 16, data) == OK
    assert read(rig, 16, 4096) == (OK, data)
    assert read(rig, 15, 512) == (OK, pattern(512))
    assert image.read_bytes()[16 * 512 : 24 * 512] == data


def test_a_request_may_be_cut_anywhere(attach: Rigger) -> None:
    rig = attach()
    head = header(abi.VIRTIO_BLK_T_OUT, 8)
    data = pattern(1024, salt=3)
    rig.queues[0].add_chain(readable=[head[:3], head[3:] + data[:5], data[5:]], writable=[1])
    rig.kick(0)
    assert rig.queues[0].take_used() == Used(0, 1)
    rig.queues[0].add_chain(readable=[header(abi.VIRTIO_BLK_T_IN, 8)], writable=[1, 1000, 22, 2])
    rig.kick(0)
    used = rig.queues[0].take_used()
    assert used is not None
    assert used.written == 1025
    assert used.data == data + bytes([OK])


def test_the_capacity_and_limits_are_in_configuration_space(attach: Rigger) -> None:
    rig = attach(queues=3)
    fields = abi.VIRTIO_BLK_CONFIG.unpack(rig.driver.read_config(0, abi.VIRTIO_BLK_CONFIG.size))
    assert fields == (2048, 0, 254, 0, 0, 0, 512, 3, 0, 8, 0, 0, 0, 3, 1 << 21, 16, 1, 1 << 17, 16, 1)


def test_every_queue_serves_the_same_disk(attach: Rigger) -> None:
    rig = attach(queues=4)
    for index in range(4):
        assert write(rig, index, pattern(512, salt=index + 10), queue=index) == OK
    for index in range(4):
        assert read(rig, index, 512, queue=3 - index) == (OK, pattern(512, salt=index + 10))


@pytest.mark.parametrize(
    ("sector", "size"),
    [(SECTORS, 512), (SECTORS - 1, 1024), (2**64 - 1, 512), (2**55, 512), (2**63, 4096), (0, 511), (0, 513)],
)
def test_what_is_not_wholly_inside_is_an_io_error(attach: Rigger, image: Path, sector: int, size: int) -> None:
    rig = attach()
    before = image.read_bytes()
    assert read(rig, sector, size)[0] == IOERR
    assert write(rig, sector, bytes(size)) == IOERR
    assert image.read_bytes() == before
    assert rig.device.statistics().refused == 2  # type: ignore[attr-defined]
    assert rig.warnings == []


def test_the_last_sector_can_be_used(attach: Rigger) -> None:
    rig = attach()
    assert write(rig, SECTORS - 1, b"x" * 512) == OK
    assert read(rig, SECTORS - 1, 512) == (OK, b"x" * 512)


def test_a_chain_of_4_gib_is_refused_without_being_read(attach: Rigger) -> None:
    rig = attach()
    rig.queues[0].add_buffers(
        [(rig.queues[0].allocate(header(abi.VIRTIO_BLK_T_IN)), 16, 0)] + [(0x100000, 0x700000, VRING_DESC_F_WRITE)] * 14
    )
    rig.kick(0)
    assert rig.queues[0].take_used() == Used(0, 0)
    assert rig.memory.read(0x7FFFFF, 1) == bytes([IOERR])
    assert rig.memory.read(0x100000, 64) == bytes(64)


def test_a_request_without_data_is_done_at_once(attach: Rigger) -> None:
    rig = attach()
    assert submit(rig, abi.VIRTIO_BLK_T_IN) == (OK, b"")
    assert submit(rig, abi.VIRTIO_BLK_T_OUT)[0] == OK


def test_the_serial_is_told(attach: Rigger) -> None:
    rig = attach(serial="root")
    assert submit(rig, abi.VIRTIO_BLK_T_GET_ID, room=20) == (OK, b"root".ljust(20, b"\0"))
    assert submit(rig, abi.VIRTIO_BLK_T_GET_ID, room=3) == (OK, b"roo")
    assert submit(rig, abi.VIRTIO_BLK_T_GET_ID, room=64) == (OK, b"root".ljust(20, b"\0"))


def test_an_unknown_request_is_unsupported(attach: Rigger) -> None:
    rig = attach()
    for kind in (2, 3, 5, 14, 0xFFFFFFFF):
        assert submit(rig, kind, data=bytes(512))[0] == UNSUPP


def test_a_read_only_disk_is_never_written(attach: Rigger, image: Path) -> None:
    image.chmod(0o444)
    rig = attach(read_only=True)
    before = image.read_bytes()
    assert rig.driver.read_features() >> abi.VIRTIO_BLK_F_RO & 1
    assert not rig.driver.read_features() >> abi.VIRTIO_BLK_F_DISCARD & 1
    assert write(rig, 0, bytes(512)) == IOERR
    for kind in (abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES):
        assert submit(rig, kind, data=segment(0, 8))[0] == IOERR
    assert submit(rig, abi.VIRTIO_BLK_T_FLUSH)[0] == OK
    assert read(rig, 0, 512) == (OK, before[:512])
    assert image.read_bytes() == before


def test_a_flush_is_answered(attach: Rigger) -> None:
    rig = attach()
    assert submit(rig, abi.VIRTIO_BLK_T_FLUSH)[0] == OK
    assert rig.device.statistics().flushes == 1  # type: ignore[attr-defined]


def test_a_driver_that_cannot_flush_is_served(attach: Rigger, image: Path) -> None:
    rig = attach(features=0)
    assert write(rig, 4, b"z" * 512) == OK
    assert submit(rig, abi.VIRTIO_BLK_T_WRITE_ZEROES, data=segment(5, 1))[0] == OK
    assert image.read_bytes()[4 * 512 : 6 * 512] == b"z" * 512 + bytes(512)


def blocks_on_disk(image: Path) -> int:
    """What it takes, once all of it has its place."""
    with image.open("rb") as file:
        os.fsync(file.fileno())
    return image.stat().st_blocks


def test_discarded_space_is_given_back(attach: Rigger, image: Path) -> None:
    rig = attach()
    before = blocks_on_disk(image)
    assert submit(rig, abi.VIRTIO_BLK_T_DISCARD, data=segment(0, 512) + segment(1024, 512))[0] == OK
    assert image.stat().st_blocks == before - 1024
    assert image.stat().st_size == SECTORS * 512
    assert read(rig, 512, 512) == (OK, pattern(512))


@pytest.mark.parametrize(("flags", "blocks_go"), [(0, False), (1, True)])
def test_zeroes_are_written_with_and_without_their_space(
    attach: Rigger, image: Path, flags: int, blocks_go: bool
) -> None:
    rig = attach()
    before = blocks_on_disk(image)
    assert submit(rig, abi.VIRTIO_BLK_T_WRITE_ZEROES, data=segment(8, 64, flags))[0] == OK
    assert read(rig, 7, 66 * 512) == (OK, pattern(512) + bytes(64 * 512) + pattern(512))
    assert (image.stat().st_blocks < before) == blocks_go


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", IOERR),
        (segment(0, 8)[:15], IOERR),
        (segment(0, 8) * 17, IOERR),
        (segment(SECTORS, 1), IOERR),
        (segment(2**64 - 1, 1), IOERR),
        (segment(0, 0xFFFFFFFF), IOERR),
        (segment(0, 8) + segment(SECTORS - 1, 2), IOERR),
        (segment(0, 8, flags=2), UNSUPP),
        (segment(0, 8, flags=0x80000001), UNSUPP),
        (segment(0, 0), OK),
    ],
)
def test_odd_segments_change_nothing(attach: Rigger, image: Path, data: bytes, status: int) -> None:
    rig = attach()
    before = image.read_bytes()
    for kind in (abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES):
        assert submit(rig, kind, data=data)[0] == status
    assert image.read_bytes() == before


@pytest.mark.parametrize("spec", [{}, {"engine": "io_uring"}, {"direct": True}, {"overlay": "discard"}])
@pytest.mark.parametrize("kind", ["read", "write", "zero", "zero and free", "discard"])
def test_a_long_request_leaves_off_when_the_disk_is_to_stop(
    attach: Rigger, image: Path, spec: dict[str, Any], kind: str
) -> None:
    """It does the step it is at, no more; the next driver finds the disk as any other."""
    step, size = 4096, 16384
    rig = attach(**spec)
    native = rig.device._backing.native  # type: ignore[attr-defined]
    native.step_size = step
    if native.bounce:
        native.bounce.size = step
    native.is_stopping = 1  # as reset does, from another thread
    if kind == "read":
        status, _ = read(rig, 0, size)
    elif kind == "write":
        status = write(rig, 0, bytes(size))
    else:
        request = abi.VIRTIO_BLK_T_DISCARD if kind == "discard" else abi.VIRTIO_BLK_T_WRITE_ZEROES
        status, _ = submit(rig, request, data=segment(0, SECTORS, kind == "zero and free"))
    assert status == IOERR
    assert rig.warnings == []
    rig.restart()
    changed = b"" if kind == "read" else bytes(step)
    assert read(rig, 0, 2 * step) == (OK, changed + pattern(2 * step - len(changed)))
    assert read(rig, SECTORS - 1, 512) == (OK, pattern(512))


def test_a_request_of_one_step_is_done_also_when_the_disk_is_to_stop(attach: Rigger) -> None:
    rig = attach()
    rig.device._backing.native.is_stopping = 1  # type: ignore[attr-defined]
    assert read(rig, 3, 512) == (OK, pattern(512))


def test_zeros_that_have_to_be_written_are_not_many(attach: Rigger, image: Path) -> None:
    """64 MiB a segment; a discard, which is never written, 1 GiB."""
    os.truncate(image, 2 << 30)
    rig = attach()
    assert submit(rig, abi.VIRTIO_BLK_T_WRITE_ZEROES, data=segment(0, (1 << 17) + 1, 1))[0] == IOERR
    assert submit(rig, abi.VIRTIO_BLK_T_WRITE_ZEROES, data=segment(0, 1 << 17, 1))[0] == OK
    assert submit(rig, abi.VIRTIO_BLK_T_DISCARD, data=segment(0, (1 << 21) + 1))[0] == IOERR
    assert submit(rig, abi.VIRTIO_BLK_T_DISCARD, data=segment(0, 1 << 21))[0] == OK


def test_a_discard_has_no_flags(attach: Rigger) -> None:
    assert submit(attach(), abi.VIRTIO_BLK_T_DISCARD, data=segment(0, 8, flags=1))[0] == UNSUPP


@pytest.mark.parametrize("readable", [b"", bytes(15)])
def test_a_request_without_a_header_breaks_the_queue(attach: Rigger, readable: bytes) -> None:
    rig = attach()
    rig.queues[0].add_chain(readable=[readable] if readable else [], writable=[1])
    rig.kick(0)
    assert rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert "request is shorter than its header" in rig.transport.statistics().last_fault


def test_a_request_without_a_status_breaks_the_queue(attach: Rigger) -> None:
    rig = attach()
    rig.queues[0].add_chain(readable=[header(abi.VIRTIO_BLK_T_FLUSH)])
    rig.kick(0)
    assert rig.driver.status == 15 | DeviceStatus.NEEDS_RESET
    assert rig.transport.statistics().last_fault == (
        "device0: queue 0: request has no room for its status: 0x0 (limit 0x1)"
    )


def test_a_broken_queue_leaves_the_others_alone(attach: Rigger) -> None:
    rig = attach(queues=2)
    rig.queues[0].publish(rig.queues[0].size)
    rig.kick(0)
    assert rig.driver.status & DeviceStatus.NEEDS_RESET
    assert read(rig, 0, 512, queue=1) == (OK, pattern(512))


@pytest.mark.parametrize("spec", [{}, {"engine": "io_uring"}, {"overlay": "discard"}])
def test_hostile_chains_do_no_harm(image: Path, spec: dict[str, Any]) -> None:
    """Whatever the chain: the device answers or asks for a reset, the image keeps its size, the machine lives."""
    kinds = st.sampled_from([0, 1, 4, 8, 11, 13, 2, 0xFFFFFFFF])
    sectors = st.integers(0, SECTORS + 8) | st.integers(0, 2**64 - 1)
    headers = st.builds(lambda kind, sector, rest: header(kind, sector) + rest, kinds, sectors, st.binary(max_size=64))
    with VirtioRig(Disk(path=str(image), queues=2, **spec).attach) as rig:

        @settings(max_examples=60, suppress_health_check=list(HealthCheck), database=None)
        @given(hostile_chains, headers, st.integers(0, 1))
        def offer(chains: HostileChains, payload: bytes, queue: int) -> None:
            check_survives(rig, queue, replace(chains, payload=payload))

        offer()
        assert rig.warnings == []
    assert image.stat().st_size == SECTORS * 512


def test_requests_wait_for_the_driver_and_none_is_lost_by_a_reset(attach: Rigger) -> None:
    rig = attach()
    for _ in range(20):
        for sector in range(5):
            rig.queues[0].add_chain(readable=[header(abi.VIRTIO_BLK_T_IN, sector)], writable=[512, 1])
        rig.driver.notify(0)
        rig.restart()
        assert read(rig, 3, 512) == (OK, pattern(512))
    assert rig.errors == []


def test_a_batch_raises_few_interrupts(attach: Rigger) -> None:
    rig = attach(rig={"queue_size": 64})
    for sector in range(20):
        rig.queues[0].add_chain(readable=[header(abi.VIRTIO_BLK_T_IN, sector)], writable=[512, 1])
    rig.kick(0)
    assert len(rig.queues[0].take_all_used()) == 20
    assert 1 <= rig.take_irq() <= 3


def test_a_worker_that_wakes_while_it_is_looked_at_is_not_idle(attach: Rigger) -> None:
    rig = attach()
    (worker,) = rig.device._workers  # type: ignore[attr-defined]
    assert not worker.is_idle_with(lambda: False)
    assert not worker.is_idle_with(lambda: read(rig, 0, 512) == (OK, pattern(512)))
    assert worker.is_idle_with(lambda: True)


@pytest.mark.parametrize("spin_us", [0.0, 100.0])
@pytest.mark.parametrize("event_idx", [False, True])
def test_no_request_is_lost_by_a_driver_that_kicks_only_when_it_must(
    image: Path, monkeypatch: pytest.MonkeyPatch, event_idx: bool, spin_us: float
) -> None:
    """The worker asks for no kicks while it looks by itself: whatever the moment, it sees what was offered then."""
    monkeypatch.setattr("kvmlite.devices.blk.device.SPIN_MAX_US", spin_us)
    barrier, draw = threading.Lock(), random.Random(spin_us)
    with VirtioRig(Disk(path=str(image)).attach, event_idx=event_idx) as rig:
        rig.start()
        queue, kicks = rig.queues[0], 0
        for number in range(400):
            old = queue.avail_idx
            queue.add_chain(readable=[header(abi.VIRTIO_BLK_T_IN, number % 100)], writable=[512, 1])
            with barrier:  # the index is stored before the wish is read
                pass
            wanted = queue.avail_event == old if event_idx else not queue.used_flags & VRING_USED_F_NO_NOTIFY
            if wanted:
                kicks += 1
                rig.driver.notify(0)
            deadline = time.monotonic() + 30
            while (used := queue.take_used()) is None:
                assert time.monotonic() < deadline, f"request {number} was lost, {kicks} kicks"
            assert used.written == 513
            if draw.random() < 0.5:
                time.sleep(draw.random() * 0.0003)
        assert rig.errors == []
    assert kicks > 0


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond a size; a write there fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_of_the_host_is_an_io_error_and_told_once(
    attach: Rigger, image: Path, file_size_limit: Callable[[int], None]
) -> None:
    rig = attach(queues=2)
    file_size_limit(SECTORS * 256)
    for index in (0, 1, 1):
        assert write(rig, SECTORS - 8, bytes(4096), queue=index) == IOERR
    assert write(rig, 0, bytes(512)) == OK
    assert rig.warnings == [f"device0: {image}: File too large; the guest sees an I/O error"]
    assert rig.device.statistics().failed == 3  # type: ignore[attr-defined]
    assert rig.errors == []


def test_an_image_that_shrinks_is_an_io_error(attach: Rigger, image: Path) -> None:
    rig = attach()
    os.truncate(image, SECTORS * 256)
    assert read(rig, SECTORS - 8, 4096)[0] == IOERR
    assert read(rig, 0, 512) == (OK, pattern(512))
    assert rig.warnings == [f"device0: {image}: Input/output error; the guest sees an I/O error"]


@pytest.fixture
def rings() -> None:
    """The host lets us have io_uring."""
    ring = ffi.new("struct kvl_uring *")
    error = lib.kvl_uring_init(ring, 8)
    if error:
        lack("io_uring", f"no io_uring here: {os.strerror(error)}")
    lib.kvl_uring_deinit(ring)


def attach_direct(attach: Rigger, **spec: Any) -> VirtioRig:
    try:
        return attach(**(spec or {"direct": True}))
    except HostError as error:
        lack("direct_io", f"no direct I/O here: {error}")


def test_direct_io_takes_any_buffer(attach: Rigger, image: Path) -> None:
    rig = attach_direct(attach)
    size = int.from_bytes(rig.driver.read_config(20, 4), "little") * 3
    data = pattern(size, salt=6)
    queue = rig.queues[0]
    queue.add_chain(readable=[header(abi.VIRTIO_BLK_T_OUT, 64), data[:20], data[20:]], writable=[1])
    rig.kick(0)
    used = queue.take_used()
    assert used is not None
    assert used.data == bytes([OK])
    assert read(rig, 64, size) == (OK, data)
    assert image.read_bytes()[64 * 512 : 64 * 512 + size] == data


@pytest.mark.parametrize("spec", [{"engine": "io_uring"}, {"direct": True}])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_ring_does_many_requests_at_once(
    attach: Rigger, image: Path, spec: dict[str, Any], event_idx: bool, rings: None
) -> None:
    rig = attach_direct(attach, rig={"queue_size": 256, "event_idx": event_idx}, **spec)
    queue, whole = rig.queues[0], bytearray(pattern(SECTORS * 512))
    expected = {}
    for number in range(40):
        sector = number * 8
        if number % 3 == 0:
            data = pattern(4096, salt=number)
            whole[sector * 512 : sector * 512 + 4096] = data
            source = 0x200000 + number * 4096
            rig.memory.write(source, data)
            head_gpa, status = queue.allocate(header(abi.VIRTIO_BLK_T_OUT, sector)), queue.allocate(b"\xee")
            head = queue.add_buffers([(head_gpa, 16, 0), (source, 4096, 0), (status, 1, VRING_DESC_F_WRITE)])
            expected[head] = bytes([OK])
        elif number % 3 == 1:
            target = 0x200000 + number * 4096
            head_gpa, status = queue.allocate(header(abi.VIRTIO_BLK_T_IN, sector)), queue.allocate(b"\xee")
            head = queue.add_buffers(
                [(head_gpa, 16, 0), (target, 4096, VRING_DESC_F_WRITE), (status, 1, VRING_DESC_F_WRITE)]
            )
            expected[head] = pattern(4096) + bytes([OK])
        else:
            head = queue.add_chain(readable=[header(abi.VIRTIO_BLK_T_FLUSH)], writable=[1])
            expected[head] = bytes([OK])
    rig.kick(0)
    assert {used.head_index: used.data for used in queue.take_all_used()} == expected
    assert image.read_bytes() == whole
    assert rig.device.statistics().failed == 0  # type: ignore[attr-defined]


def test_a_ring_tells_errors_and_refuses_as_the_sync_engine(
    attach: Rigger, image: Path, file_size_limit: Callable[[int], None], rings: None
) -> None:
    rig = attach(engine="io_uring", serial="ring")
    file_size_limit(SECTORS * 256)
    assert write(rig, SECTORS - 8, bytes(4096)) == IOERR
    assert write(rig, SECTORS, bytes(512)) == IOERR
    assert submit(rig, abi.VIRTIO_BLK_T_GET_ID, room=20)[1] == b"ring".ljust(20, b"\0")
    assert submit(rig, abi.VIRTIO_BLK_T_DISCARD, data=segment(0, 8))[0] == OK
    os.truncate(image, SECTORS * 256)
    assert read(rig, SECTORS - 8, 4096)[0] == IOERR
    assert read(rig, SECTORS // 2 - 4, 4096)[0] == IOERR
    assert rig.warnings == [
        f"device0: {image}: File too large; the guest sees an I/O error",
        f"device0: {image}: Input/output error; the guest sees an I/O error",
    ]


def test_a_reset_waits_for_what_is_in_the_ring(attach: Rigger, rings: None) -> None:
    rig = attach(engine="io_uring", rig={"queue_size": 64})
    for _ in range(30):
        for sector in range(15):
            rig.queues[0].add_chain(readable=[header(abi.VIRTIO_BLK_T_IN, sector)], writable=[512, 1])
        rig.driver.notify(0)
        rig.restart()
        assert read(rig, 3, 512) == (OK, pattern(512))
    assert rig.errors == []


def test_without_io_uring_there_is_the_sync_engine(attach: Rigger, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise HostError("io_uring: Operation not permitted", 1)

    monkeypatch.setattr("kvmlite.devices.blk.device._Ring", refuse)
    rig = attach(engine="io_uring")
    assert read(rig, 3, 512) == (OK, pattern(512))
    assert rig.warnings == [
        "device0: the host has no io_uring for us (io_uring: Operation not permitted): one request at a time instead"
    ]


def test_direct_io_reads_and_writes(attach: Rigger, image: Path) -> None:
    rig = attach_direct(attach)
    block = rig.driver.read_config(20, 4)
    assert int.from_bytes(block, "little") in (512, 1024, 2048, 4096)
    gpa = 0x100000
    rig.memory.write(gpa, pattern(4096, salt=5))
    queue = rig.queues[0]
    queue.add_buffers(
        [
            (queue.allocate(header(abi.VIRTIO_BLK_T_OUT, 64)), 16, 0),
            (gpa, 4096, 0),
            (queue.allocate(b"\xee"), 1, VRING_DESC_F_WRITE),
        ]
    )
    rig.kick(0)
    used = queue.take_used()
    assert used is not None
    assert used.data == bytes([OK])
    assert image.read_bytes()[64 * 512 : 72 * 512] == pattern(4096, salt=5)


def test_an_overlay_takes_the_writes(attach: Rigger, image: Path) -> None:
    image.chmod(0o444)
    first, second = attach(overlay="discard", queues=2), attach(overlay="discard")
    assert write(first, 9, pattern(512, salt=2)) == OK  # a part of a cluster
    assert write(first, 24, pattern(4096, salt=3), queue=1) == OK  # a whole one
    assert write(first, SECTORS - 1, pattern(512, salt=4)) == OK
    assert submit(first, abi.VIRTIO_BLK_T_FLUSH)[0] == OK
    whole = bytearray(pattern(SECTORS * 512))
    whole[9 * 512 : 10 * 512] = pattern(512, salt=2)
    whole[24 * 512 : 32 * 512] = pattern(4096, salt=3)
    whole[-512:] = pattern(512, salt=4)
    for sector in (0, 2, 7, 20, 31, 32):
        assert read(first, sector, 8192) == (OK, whole[sector * 512 : sector * 512 + 8192])
    assert read(first, SECTORS - 16, 8192, queue=1) == (OK, whole[-8192:])
    assert read(second, 0, 16384) == (OK, pattern(16384))
    assert image.read_bytes() == pattern(SECTORS * 512)


def test_an_overlay_discards_and_zeroes_exactly(attach: Rigger, image: Path) -> None:
    rig = attach(overlay="discard")
    assert submit(rig, abi.VIRTIO_BLK_T_DISCARD, data=segment(3, 30))[0] == OK
    assert submit(rig, abi.VIRTIO_BLK_T_WRITE_ZEROES, data=segment(50, 2) + segment(SECTORS - 3, 3))[0] == OK
    assert write(rig, 10, pattern(512, salt=2)) == OK
    whole = bytearray(pattern(SECTORS * 512))
    for first, count in ((3, 30), (50, 2), (SECTORS - 3, 3)):
        whole[first * 512 : (first + count) * 512] = bytes(count * 512)
    whole[10 * 512 : 11 * 512] = pattern(512, salt=2)
    assert read(rig, 0, 64 * 512) == (OK, whole[: 64 * 512])
    assert read(rig, SECTORS - 8, 8 * 512) == (OK, whole[-8 * 512 :])
    assert image.read_bytes() == pattern(SECTORS * 512)


def test_an_overlay_behaves_like_a_file(attach: Rigger, image: Path) -> None:
    """Random requests, held against the same on plain bytes; the image ends in the middle of a cluster."""
    os.truncate(image, 1021 * 512)
    rig, model, draw = attach(overlay="discard"), bytearray(image.read_bytes()), random.Random(1)
    for step in range(300):
        first = draw.randrange(1021)
        count = min(draw.choice((1, 2, 8, 9, 40)), 1021 - first)
        span = slice(first * 512, (first + count) * 512)
        kind = draw.choice("rrwwz")
        if kind == "r":
            assert read(rig, first, count * 512) == (OK, model[span]), step
        elif kind == "w":
            model[span] = pattern(count * 512, salt=step)
            assert write(rig, first, bytes(model[span])) == OK
        else:
            model[span] = bytes(count * 512)
            assert submit(rig, abi.VIRTIO_BLK_T_WRITE_ZEROES, data=segment(first, count))[0] == OK
    assert rig.warnings == []


def test_an_overlay_needs_an_image_that_nobody_writes_to(attach: Rigger, image: Path) -> None:
    attach()
    with pytest.raises(HostError, match="another disk of this one, writes to it"):
        attach(overlay="discard")


def test_an_overlay_is_kept_where_the_image_is_or_in_the_cache(
    attach: Rigger, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path / "home"))
    with VirtioRig(Disk(path=str(image), overlay="discard").attach):
        names = [name for _, name in open_descriptors()]
        assert any(name.startswith(f"{tmp_path}/#") or "/.kvmlite-" in name for name in names), names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


@pytest.mark.parametrize(
    ("limits", "wait_s"), [({"iops": 100, "burst_s": 0.01}, 0.19), ({"bandwidth": 102400, "burst_s": 0.01}, 0.19)]
)
def test_limits_make_the_driver_wait_and_lose_nothing(attach: Rigger, limits: dict[str, Any], wait_s: float) -> None:
    rig = attach(rig={"queue_size": 64}, **limits)
    begin = time.monotonic()
    for sector in range(20):
        kind = abi.VIRTIO_BLK_T_IN if sector % 2 else abi.VIRTIO_BLK_T_OUT
        data = () if sector % 2 else (pattern(1024),)
        rig.queues[0].add_chain(readable=[header(kind, sector), *data], writable=[1024, 1] if sector % 2 else [1])
    rig.kick(0)
    assert time.monotonic() - begin >= wait_s
    used = rig.queues[0].take_all_used()
    assert [len(entry.data) for entry in used] == [1, 1025] * 10
    assert {entry.data[-1] for entry in used} == {OK}
    assert rig.device.statistics().pauses > 0  # type: ignore[attr-defined]


def test_a_reset_ends_a_wait(attach: Rigger) -> None:
    rig = attach(iops=1, burst_s=1)
    for _ in range(3):
        rig.queues[0].add_chain(readable=[header(abi.VIRTIO_BLK_T_FLUSH)], writable=[1])
    rig.driver.notify(0)
    rig.driver.reset()
    assert rig.errors == []


def test_a_disk_that_is_written_has_one_user(image: Path) -> None:
    with VirtioRig(Disk(path=str(image)).attach):
        for read_only in (False, True):
            with pytest.raises(HostError, match=r"disk .*/disk\.img is in use: another virtual machine"):
                VirtioRig(Disk(path=str(image), read_only=read_only).attach)
    with VirtioRig(Disk(path=str(image), read_only=True).attach):
        with VirtioRig(Disk(path=str(image), read_only=True).attach):
            with pytest.raises(HostError, match="uses it"):
                VirtioRig(Disk(path=str(image)).attach)


@pytest.mark.tools
@pytest.mark.parametrize("our_side", ["reads", "writes"])
@pytest.mark.parametrize("qemu_side", ["reads", "writes"])
def test_our_locks_and_those_of_qemu_mind_each_other(image: Path, our_side: str, qemu_side: str) -> None:
    may_share = our_side == qemu_side == "reads"
    disk = Disk(path=str(image), read_only=our_side == "reads")
    command = ["qemu-io", "-f", "raw", *(["-r"] if qemu_side == "reads" else []), str(image)]
    with VirtioRig(disk.attach):
        done = subprocess.run([*command, "-c", "read 0 512"], capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode == 0) == may_share, done.stderr
        assert may_share or "lock" in done.stderr
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"read 0 512\n")
    process.stdin.flush()
    while b"read 512" not in process.stdout.readline():
        pass
    try:
        if may_share:
            VirtioRig(disk.attach).close()
        else:
            with pytest.raises(HostError, match="is in use: another virtual machine"):
                VirtioRig(disk.attach)
    finally:
        process.communicate(b"quit\n", timeout=30)


def test_an_image_of_an_odd_size_is_refused_with_advice(image: Path) -> None:
    os.truncate(image, 1000)
    with pytest.raises(ImageError, match="has 1000 bytes, not a whole number of 512-byte blocks") as raised:
        VirtioRig(Disk(path=str(image)).attach)
    assert raised.value.hint == f"if it is a raw image that was cut short: truncate -s 1024 {image}"
    os.truncate(image, 0)
    with pytest.raises(ImageError, match="is empty"):
        VirtioRig(Disk(path=str(image)).attach)


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        VirtioRig(Disk(path=str(tmp_path)).attach)
    with pytest.raises(HostError, match=r"cannot open disk .*/missing: No such file or directory") as caught:
        VirtioRig(Disk(path=str(tmp_path / "missing")).attach)
    assert "truncate -s 1G" in caught.value.hint


@pytest.mark.parametrize(("read_only", "hint"), [(False, "open it read-only"), (True, "get the right to read it")])
def test_who_may_not_open_a_disk_is_told_what_is_missing(
    image: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool, hint: str
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("kvmlite.host.disk.os.open", refuse)
    with pytest.raises(HostError, match="Permission denied") as caught:
        DiskFile(str(image), read_only=read_only)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    "spec",
    [
        {"path": ""},
        {"path": "a\0b"},
        {"serial": "x" * 21},
        {"serial": "\n"},
        {"serial": "ä"},
        {"queues": 0},
        {"queues": 17},
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="disk: "):
        Disk(**{"path": "disk.img", **spec})
