"""The vhost-user front end against back ends of every kind: good, dying, lying and silent."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from support.fake_back_end import CONFIG, FEATURES, PROTOCOL, FakeBackEnd

from kvmlite.abi import vhost_user as abi
from kvmlite.abi.vhost_user import ProtocolFeature, Request
from kvmlite.abi.virtio import VRING_DESC_F_WRITE, DeviceStatus
from kvmlite.devices import vhost_user
from kvmlite.devices.vhost_user import VhostUserDevice
from kvmlite.devices.vhost_user_loss import RESTART_LIMIT
from kvmlite.errors import ConfigError, HostError
from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing import Used, VirtioRig
from kvmlite.testing import rig as rig_module
from kvmlite.virtio.device import DeviceResources
from kvmlite.virtio.queue import DescriptorChain
from kvmlite.virtio.vhost_user import session
from kvmlite.virtio.vhost_user.connection import Connection

PATIENCE_S = 30.0
ERROR = b"EIO!"


def write_error(chain: DescriptorChain) -> int:
    return chain.write(ERROR)


class Bench:
    """A device in front of back ends that the test prepares: one for each start."""

    def __init__(self, in_order: bool) -> None:
        self.in_order = in_order
        self.prepared: list[Callable[[], FakeBackEnd]] = []
        self.started: list[FakeBackEnd] = []
        self.rigs: list[VirtioRig] = []

    def start(self) -> tuple[FakeBackEnd, object]:
        if not self.prepared:
            raise HostError("no more of them", errno.ENOENT)
        self.started.append(self.prepared.pop(0)())
        return self.started[-1], self.started[-1].client

    def make(self, resources: DeviceResources, *, lost_with_it: str = "") -> VhostUserDevice:
        return VhostUserDevice(
            resources,
            self.start,  # type: ignore[arg-type]
            device_id=26,
            queue_sizes=(16, 16),
            features=1 << 5,
            config=16,
            fail=write_error,
            lost_with_it=lost_with_it,
            in_order=self.in_order,
        )

    def rig(self, *back_ends: Callable[[], FakeBackEnd], lost_with_it: str = "") -> VirtioRig:
        self.prepared = list(back_ends)
        rig = VirtioRig(lambda resources: self.make(resources, lost_with_it=lost_with_it), memory_backing="memfd")
        self.rigs.append(rig)
        return rig


@pytest.fixture(params=["in order", "with a ledger"])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(vhost_user, "_LAST_WORDS_S", 0.1)
    bench = Bench(in_order=request.param == "in order")
    yield bench
    for rig in bench.rigs:
        rig.close()
        assert not rig.errors
    assert not [back_end for back_end in bench.started if back_end.is_running]


def wait_for(rig: VirtioRig, what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, f"warnings: {rig.warnings}, errors: {rig.errors}"
        rig.loop.run()
        time.sleep(0.001)


def answer(rig: VirtioRig, index: int = 0) -> Used:
    """The next chain that comes back, whoever sends it."""
    found: list[Used] = []
    wait_for(rig, lambda: found or found.extend(rig.queues[index].take_all_used()))
    assert len(found) == 1
    return found[0]


def ask(rig: VirtioRig, index: int = 0) -> bytes:
    rig.queues[index].add_chain(readable=[b"?"], writable=[4])
    rig.driver.notify(index)
    return answer(rig, index).data


def has_ended(back_end: FakeBackEnd) -> bool:
    return not back_end.is_running


def test_queues_are_served_by_the_back_end_and_interrupts_come_from_it(bench: Bench) -> None:
    rig = bench.rig(FakeBackEnd)
    rig.start()
    assert ask(rig, 0) == b"xxxx"
    assert ask(rig, 1) == b"xxxx"
    assert rig.driver.take_interrupt() & 1
    wait_for(rig, rig.take_irq)
    assert rig.driver.read_config(0, 16) == CONFIG
    assert bench.started[0].seen[:5] == [
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.SET_PROTOCOL_FEATURES,
        Request.SET_OWNER,
        Request.GET_QUEUE_NUM,
    ]
    assert bench.started[0].driver_features & 1 << abi.VHOST_USER_F_PROTOCOL_FEATURES
    assert not rig.warnings


def test_the_protocols_own_features_are_kept_from_the_driver(bench: Bench) -> None:
    rig = bench.rig(lambda: FakeBackEnd(features=FEATURES | 1 << 5 | 1 << 7 | 1 << 26))
    assert rig.driver.read_features() == FEATURES & ~(1 << 30) | 1 << 5


def test_a_reset_takes_the_queues_back_and_the_driver_may_come_again(bench: Bench) -> None:
    rig = bench.rig(FakeBackEnd)
    rig.start()
    assert ask(rig) == b"xxxx"
    rig.restart()
    assert bench.started[0].seen.count(Request.GET_VRING_BASE) == 2
    assert ask(rig) == b"xxxx"
    assert len(bench.started) == 1
    assert not rig.warnings


def test_a_back_end_without_protocol_features_will_do(bench: Bench) -> None:
    def old(resources: DeviceResources) -> VhostUserDevice:
        return VhostUserDevice(
            resources, bench.start, device_id=26, queue_sizes=(16,), features=0, config=b"", fail=write_error,
            lost_with_it="its mind is lost",
            in_order=True,
        )  # type: ignore[arg-type]  # fmt: skip

    bench.prepared = [lambda: FakeBackEnd(features=FEATURES & ~(1 << 30))]
    with VirtioRig(old, memory_backing="memfd") as rig:
        rig.start()
        assert ask(rig) == b"xxxx"
        assert Request.SET_VRING_ENABLE not in bench.started[0].seen


def test_anonymous_memory_is_refused_before_anything_is_started(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="cannot reach anonymous guest memory"):
        VirtioRig(bench.make)
    assert not bench.started


def test_a_back_end_that_dies_while_idle_is_started_again_and_nothing_is_lost(bench: Bench) -> None:
    rig = bench.rig(FakeBackEnd, FakeBackEnd)
    rig.start()
    assert ask(rig) == b"xxxx"
    bench.started[0].die()
    wait_for(rig, lambda: rig.warnings)
    assert rig.warnings == ["device0: fake-daemon was killed (SIGKILL); it was started again, and no request was lost"]
    assert bench.started[1].bases == {0: 1, 1: 0}
    assert ask(rig) == b"xxxx"
    rig.restart()
    assert ask(rig) == b"xxxx"


def test_requests_under_way_fail_if_nobody_took_note_of_them(bench: Bench) -> None:
    rig = bench.rig(lambda: FakeBackEnd(serve=False), FakeBackEnd)
    rig.start()
    for _ in range(3):
        rig.queues[0].add_chain(readable=[b"?"], writable=[4])
    rig.driver.notify(0)
    bench.started[0].die()
    wait_for(rig, lambda: rig.warnings)
    assert [used.data for used in rig.queues[0].take_all_used()] == [ERROR] * 3
    assert rig.warnings[0].endswith("it was started again, 3 requests that were under way have failed")
    assert bench.started[1].bases == {0: 3, 1: 0}
    assert ask(rig) == b"xxxx"


def test_a_driver_notifies_the_next_back_end_wherever_the_last_one_wanted_to_hear(bench: Bench) -> None:
    bench.prepared = [lambda: FakeBackEnd(serve=False), FakeBackEnd]
    rig = VirtioRig(bench.make, memory_backing="memfd", event_idx=True)
    bench.rigs.append(rig)
    rig.start()
    for _ in range(3):
        rig.queues[0].add_chain(writable=[4])
    bench.started[0].die()
    wait_for(rig, lambda: rig.warnings)
    assert rig.queues[0].avail_event == 3


def test_requests_under_way_go_on_if_both_back_ends_take_note(bench: Bench) -> None:
    protocol = PROTOCOL | 1 << ProtocolFeature.INFLIGHT_SHMFD
    rig = bench.rig(lambda: FakeBackEnd(protocol=protocol, serve=False), lambda: FakeBackEnd(protocol=protocol))
    rig.start()
    rig.queues[0].add_chain(writable=[4])
    rig.driver.notify(0)
    bench.started[0].die()
    assert answer(rig).data == b"xxxx"
    wait_for(rig, lambda: rig.warnings)
    assert rig.warnings[0].endswith("no request was lost")
    assert bench.started[1].was_given_inflight
    assert Request.GET_INFLIGHT_FD not in bench.started[1].seen


def test_without_a_way_back_every_request_fails_and_the_user_is_told_once(bench: Bench) -> None:
    rig = bench.rig(lambda: FakeBackEnd(serve=False), lost_with_it="its mind is lost")
    rig.start()
    rig.queues[0].add_chain(writable=[4])
    bench.started[0].die()
    assert answer(rig).data == ERROR
    for index in (0, 1, 0):
        assert ask(rig, index) == ERROR
    rig.restart()
    assert ask(rig) == ERROR
    wait_for(rig, lambda: rig.warnings)
    assert len(rig.warnings) == 1
    assert rig.warnings[0].startswith("device0: fake-daemon was killed (SIGKILL): its mind is lost; the guest gets")
    assert not DeviceStatus.NEEDS_RESET & rig.driver.status


def test_a_back_end_that_cannot_be_started_again_is_given_up(bench: Bench) -> None:
    rig = bench.rig(FakeBackEnd)
    rig.start()
    bench.started[0].die()
    wait_for(rig, lambda: rig.warnings)
    assert "it cannot be started again (no more of them); the guest gets I/O errors" in rig.warnings[0]
    assert ask(rig) == ERROR


def test_one_that_dies_again_and_again_is_given_up(bench: Bench) -> None:
    rig = bench.rig(*[FakeBackEnd] * (RESTART_LIMIT + 2))
    rig.start()
    while len(rig.warnings) <= RESTART_LIMIT:
        assert ask(rig) == b"xxxx"
        told = len(rig.warnings)
        bench.started[-1].die()
        wait_for(rig, lambda told=told: len(rig.warnings) > told)
    assert "it has ended 4 times within 60 s" in rig.warnings[-1]
    assert ask(rig) == ERROR


def test_one_that_hangs_up_without_dying_is_ended_and_replaced(bench: Bench) -> None:
    rig = bench.rig(FakeBackEnd, FakeBackEnd)
    rig.start()
    bench.started[0].hang_up()
    wait_for(rig, lambda: rig.warnings)
    assert "fake-daemon has closed the connection; it was started again" in rig.warnings[0]
    assert has_ended(bench.started[0])
    assert ask(rig) == b"xxxx"


def test_one_that_comes_back_as_another_device_is_given_up(bench: Bench) -> None:
    def lie(back_end: FakeBackEnd, request: int, payload: bytes) -> bool:
        if request != Request.GET_CONFIG:
            return False
        back_end.reply(request, payload[:12] + bytes(16))
        return True

    rig = bench.rig(FakeBackEnd, lambda: FakeBackEnd(misbehave=lie))
    rig.start()
    bench.started[0].die()
    wait_for(rig, lambda: rig.warnings)
    assert "it came back as another device" in rig.warnings[0]
    assert has_ended(bench.started[1])


def test_a_death_while_no_driver_is_up_is_mended_before_one_comes(bench: Bench) -> None:
    rig = bench.rig(FakeBackEnd, FakeBackEnd)
    bench.started[0].die()
    wait_for(rig, lambda: rig.warnings)
    rig.start()
    assert ask(rig) == b"xxxx"


def die_at(request: Request) -> Callable[[FakeBackEnd, int, bytes], bool]:
    def misbehave(back_end: FakeBackEnd, seen: int, payload: bytes) -> bool:
        if seen == request:
            raise OSError("dies")
        return False

    return misbehave


HANDSHAKE = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.SET_PROTOCOL_FEATURES, Request.SET_OWNER,
             Request.GET_QUEUE_NUM, Request.GET_CONFIG)  # fmt: skip
START = (Request.SET_FEATURES, Request.SET_MEM_TABLE, Request.SET_VRING_NUM, Request.SET_VRING_BASE,
         Request.SET_VRING_ADDR, Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE)  # fmt: skip


@pytest.mark.parametrize("request_", HANDSHAKE)
def test_death_in_the_handshake_is_an_error_of_the_start(bench: Bench, request_: Request) -> None:
    with pytest.raises(HostError, match="fake-daemon"):
        bench.rig(lambda: FakeBackEnd(misbehave=die_at(request_)))
    assert has_ended(bench.started[0])


def test_nobody_sees_to_a_death_while_the_device_is_being_made_and_cannot_be(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_end = FakeBackEnd()

    def die_and_run_out_of_descriptors() -> None:
        ended()
        raise OSError(errno.EMFILE, "no more of them")

    def watch(loop: object, on_end: Callable[[], None]) -> None:
        nonlocal ended
        ended = on_end

    ended: Callable[[], None] = lambda: None  # noqa: E731
    monkeypatch.setattr(back_end, "watch", watch)
    monkeypatch.setattr(vhost_user.select, "epoll", die_and_run_out_of_descriptors)
    with pytest.raises(OSError, match="no more of them"):
        bench.rig(lambda: back_end, lost_with_it="it was the only one")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recover-")]


@pytest.mark.parametrize("request_", START)
def test_death_at_the_drivers_start_is_mended_behind_its_back(bench: Bench, request_: Request) -> None:
    rig = bench.rig(lambda: FakeBackEnd(misbehave=die_at(request_)), FakeBackEnd)
    rig.start()
    may_have_begun = request_ in (Request.SET_VRING_KICK, Request.SET_VRING_ENABLE)
    assert ask(rig) in (b"xxxx", ERROR if may_have_begun else b"xxxx")
    wait_for(rig, lambda: rig.warnings)
    assert ask(rig) == b"xxxx"
    assert len(rig.warnings) == 1


def test_death_at_the_reset_leaves_the_queues_alone(bench: Bench) -> None:
    rig = bench.rig(lambda: FakeBackEnd(misbehave=die_at(Request.GET_VRING_BASE)), FakeBackEnd)
    rig.start()
    assert ask(rig) == b"xxxx"
    rig.driver.reset()
    wait_for(rig, lambda: rig.warnings)
    rig.restart()
    assert ask(rig) == b"xxxx"


def lie(request: Request, payload: bytes, **how: int) -> Callable[[FakeBackEnd, int, bytes], bool]:
    def misbehave(back_end: FakeBackEnd, seen: int, _: bytes) -> bool:
        if seen == request:
            back_end.reply(how.get("as_", request), payload, **{k: v for k, v in how.items() if k != "as_"})
        return seen == request

    return misbehave


LIES = {
    "short number": (lie(Request.GET_FEATURES, b"1234"), "with 4 bytes, expected are 8"),
    "long number": (lie(Request.GET_FEATURES, bytes(16)), "with 16 bytes, expected are 8"),
    "huge size": (lie(Request.GET_FEATURES, b"", size=0xFFFFFFFF), "4294967295 bytes, allowed are 4096"),
    "no reply flag": (lie(Request.GET_FEATURES, bytes(8), flags=1), r"with message 1 \(flags 0x1\)"),
    "wrong version": (lie(Request.GET_FEATURES, bytes(8), flags=6), r"with message 1 \(flags 0x6\)"),
    "other request": (lie(Request.GET_FEATURES, bytes(8), as_=15), "answers GET_FEATURES with message 15"),
    "a refusal": (lie(Request.SET_OWNER, abi.U64.pack(1)), r"refuses SET_OWNER \(status 1\)"),
    "too few queues": (lie(Request.GET_QUEUE_NUM, abi.U64.pack(1)), "serves 1 queues, the device has 2"),
    "config cut": (lie(Request.GET_CONFIG, bytes(20)), "GET_CONFIG with 20 bytes"),
    "config refused": (lie(Request.GET_CONFIG, b""), "GET_CONFIG with 0 bytes"),
    "a legacy device": (lie(Request.GET_FEATURES, abi.U64.pack(1 << 29)), "from before VIRTIO 1.0"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_reply_that_makes_no_sense_is_refused(bench: Bench, name: str) -> None:
    misbehave, message = LIES[name]
    with pytest.raises(HostError, match=message):
        bench.rig(lambda: FakeBackEnd(misbehave=misbehave))
    assert has_ended(bench.started[0])


def test_a_silent_back_end_costs_a_limited_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_ignored(request: Request, back_end: FakeBackEnd, seen: int, payload: bytes) -> bool:
        return seen == request

    def ignore(request: Request) -> Callable[[FakeBackEnd, int, bytes], bool]:
        return partial(is_ignored, request)

    time_left = Connection._time_left

    def patient_time_left(connection: Connection, doing: str) -> float:
        """The short limit is for what nobody answers; with all else a busy host may take its time."""
        silent = bench.started[-1].misbehave
        has_limit = isinstance(silent, partial) and doing == f"answer {silent.args[0].name}"
        return time_left(connection, doing) if has_limit else PATIENCE_S

    monkeypatch.setattr(Connection, "_time_left", patient_time_left)
    monkeypatch.setattr(session.Session._set_timeout, "__defaults__", (0.1,))
    monkeypatch.setattr(session.Session.__init__, "__defaults__", (0.1,))
    monkeypatch.setattr(vhost_user, "HANDSHAKE_TIMEOUT_S", 0.1)
    with pytest.raises(HostError, match="did not answer GET_FEATURES in time"):
        bench.rig(lambda: FakeBackEnd(misbehave=ignore(Request.GET_FEATURES)))
    rig = bench.rig(lambda: FakeBackEnd(misbehave=ignore(Request.SET_MEM_TABLE)), FakeBackEnd)
    rig.start()
    assert ask(rig) == b"xxxx"
    wait_for(rig, lambda: rig.warnings)
    assert "fake-daemon did not answer SET_MEM_TABLE in time; it was started again" in rig.warnings[0]
    rig = bench.rig(lambda: FakeBackEnd(misbehave=ignore(Request.GET_VRING_BASE)), FakeBackEnd)
    rig.start()
    rig.driver.reset()
    assert has_ended(bench.started[-1])
    wait_for(rig, lambda: rig.warnings)
    assert "did not answer GET_VRING_BASE in time" in rig.warnings[0]


def test_an_area_for_requests_under_way_is_checked(bench: Bench) -> None:
    protocol = PROTOCOL | 1 << ProtocolFeature.INFLIGHT_SHMFD
    bad = lie(Request.GET_INFLIGHT_FD, abi.INFLIGHT.pack(1 << 40, 0, 2, 16))
    rig = bench.rig(lambda: FakeBackEnd(protocol=protocol, misbehave=bad), FakeBackEnd)
    rig.start()
    assert ask(rig) == b"xxxx"
    wait_for(rig, lambda: rig.warnings)
    assert "answers GET_INFLIGHT_FD with 24 bytes and 0 descriptors" in rig.warnings[0]


def test_a_driver_that_breaks_its_rings_after_the_death_is_asked_for_a_reset(bench: Bench) -> None:
    rig = bench.rig(lambda: FakeBackEnd(serve=False), lost_with_it="its mind is lost")
    rig.start()
    rig.queues[0].set_avail_idx(100)
    bench.started[0].die()
    wait_for(rig, lambda: DeviceStatus.NEEDS_RESET & rig.driver.status)
    rig.restart()
    assert ask(rig) == ERROR


@pytest.mark.parametrize("seed", range(12))
def test_no_garbage_in_the_rings_of_a_dead_back_end_does_harm(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    rig = bench.rig(lambda: FakeBackEnd(serve=False), lost_with_it="its mind is lost")
    rig.start()
    queue = rig.queues[0]
    for _ in range(dice.randrange(4)):
        queue.add_chain(readable=[b"?"], writable=[4])
    for _ in range(dice.randrange(1, 12)):
        gpa = dice.randrange(queue.desc_gpa, queue.used_gpa + 4 + 8 * queue.size)
        rig.memory.write(gpa, dice.choice([dice.randbytes(1), dice.randbytes(16), b"\xff" * 8, bytes(8)]))
    bench.started[0].die()
    wait_for(rig, lambda: rig.warnings)
    rig.kick(0)
    assert not rig.errors
    assert ask(rig, 1) == ERROR  # the other queue is sound
    rig.driver.reset()
    for each in rig.queues:
        each.clear()
    rig.start()
    assert ask(rig) == ERROR


def test_memory_in_two_parts_is_found_in_both(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    high = 1 << 32
    monkeypatch.setattr(
        rig_module,
        "GuestMemory",
        lambda size, backing: GuestMemory(size, backing=backing, layout=[(0, 6 << 20), (high, size - (6 << 20))]),
    )
    rig = bench.rig(FakeBackEnd)
    rig.start()
    rig.queues[0].add_buffers([(high + 0x1000, 4, VRING_DESC_F_WRITE)])
    rig.driver.notify(0)
    assert answer(rig).data == b"xxxx"
