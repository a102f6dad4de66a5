"""The device loop: callbacks on one thread, calls into it, and how it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmlite.errors import StateError
from kvmlite.host.eventfd import EventFd
from kvmlite.host.loop import DeviceLoop


class Loop:
    """A started loop, and what escaped from its callbacks."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.loop = DeviceLoop(self.errors.append)
        self.loop.start()


@pytest.fixture
def running() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.loop.stop()


@pytest.fixture
def event() -> Iterator[EventFd]:
    event = EventFd()
    yield event
    event.close()


def test_a_call_runs_on_the_loop_s_thread_and_returns_its_result(running: Loop) -> None:
    assert running.loop.call(threading.get_ident) != threading.get_ident()
    assert running.loop.call(lambda: 6 * 7) == 42
    assert running.loop.call(running.loop.is_current)
    assert not running.loop.is_current()


def test_a_call_raises_what_the_function_raised(running: Loop) -> None:
    with pytest.raises(ZeroDivisionError):
        running.loop.call(lambda: 1 // 0)
    assert running.errors == []


def test_a_call_from_the_loop_itself_does_not_wait(running: Loop) -> None:
    assert running.loop.call(lambda: running.loop.call(lambda: "inner")) == "inner"


def test_a_call_to_a_busy_loop_gives_up(running: Loop) -> None:
    release = threading.Event()
    running.loop.post(lambda: release.wait(30))
    with pytest.raises(StateError, match=r"the device loop did not answer within 0.01 s"):
        running.loop.call(lambda: None, timeout_s=0.01)
    release.set()


def test_posts_run_in_order(running: Loop) -> None:
    seen: list[int] = []
    for number in range(100):
        running.loop.post(lambda number=number: seen.append(number))
    running.loop.call(lambda: None)
    assert seen == list(range(100))


def test_a_reader_is_called_while_there_is_something(running: Loop, event: EventFd) -> None:
    seen = threading.Semaphore(0)

    def readable() -> None:
        event.drain()
        seen.release()

    running.loop.add_reader(event.fd, readable)
    for _ in range(3):
        event.signal()
        assert seen.acquire(timeout=30)
    running.loop.remove_reader(event.fd)
    event.signal()
    running.loop.call(lambda: None)
    assert not seen.acquire(blocking=False)


def test_after_removal_returns_no_callback_runs(running: Loop, event: EventFd) -> None:
    entered, removed = threading.Event(), threading.Event()
    ran_after: list[bool] = []

    def slow() -> None:
        entered.set()
        time.sleep(0.02)
        ran_after.append(removed.is_set())

    running.loop.add_reader(event.fd, slow)
    event.signal()
    assert entered.wait(30)
    running.loop.remove_reader(event.fd)
    removed.set()
    assert ran_after
    assert not any(ran_after)


def test_a_descriptor_that_takes_a_removed_ones_number_is_not_called_for_it(running: Loop, event: EventFd) -> None:
    fd, called = os.dup(event.fd), []
    is_blocked, go_on, other = threading.Event(), threading.Event(), EventFd()

    def replace() -> None:
        running.loop.remove_reader(fd)
        os.dup2(other.fd, fd, inheritable=False)
        running.loop.add_reader(fd, lambda: called.append("new"))

    running.loop.add_reader(fd, lambda: (event.drain(), called.append("old"))[0])
    running.loop.post(lambda: (is_blocked.set(), go_on.wait(30))[0])
    assert is_blocked.wait(30)
    running.loop.post(replace)
    event.signal()
    go_on.set()
    for _ in range(2):
        running.loop.call(lambda: None)
    running.loop.remove_reader(fd)
    os.close(fd)
    other.close()
    assert called == ["old"]


def test_reader_and_writer_of_one_descriptor_are_independent(running: Loop) -> None:
    read_end, write_end = os.pipe()
    try:
        writable, readable = threading.Event(), threading.Event()
        running.loop.add_writer(write_end, writable.set)
        assert writable.wait(30)
        running.loop.remove_writer(write_end)
        running.loop.add_reader(read_end, readable.set)
        os.write(write_end, b"x")
        assert readable.wait(30)
        running.loop.remove_reader(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_hang_up_calls_the_reader(running: Loop) -> None:
    read_end, write_end = os.pipe()
    called = threading.Event()
    running.loop.add_reader(read_end, called.set)
    os.close(write_end)
    assert called.wait(30)
    running.loop.remove_reader(read_end)
    os.close(read_end)


def test_a_regular_file_is_always_ready(running: Loop, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_CLOEXEC)
    taken, done = bytearray(), threading.Event()

    def readable() -> None:
        data = os.read(fd, 2)
        taken.extend(data)
        if not data:
            running.loop.remove_reader(fd)
            done.set()

    running.loop.add_reader(fd, readable)
    assert done.wait(30)
    os.close(fd)
    assert bytes(taken) == b"abc"


def test_removing_what_was_never_added_is_fine(running: Loop, event: EventFd) -> None:
    running.loop.remove_reader(event.fd)
    running.loop.remove_writer(event.fd)


def test_a_descriptor_that_is_not_open_is_refused_and_forgotten(running: Loop, event: EventFd) -> None:
    fd = os.dup(event.fd)
    os.close(fd)
    for _ in range(2):
        with pytest.raises(OSError, match="Bad file descriptor"):
            running.loop.add_reader(fd, lambda: None)


def test_an_exception_in_a_callback_goes_to_on_error_and_the_loop_goes_on(running: Loop, event: EventFd) -> None:
    failure = RuntimeError("bug")

    def broken() -> None:
        event.drain()
        raise failure

    running.loop.add_reader(event.fd, broken)
    event.signal()
    while not running.errors:
        time.sleep(0.001)
    assert running.errors == [failure]
    assert running.loop.call(lambda: "still here") == "still here"


def test_an_exception_in_a_post_goes_to_on_error(running: Loop) -> None:
    running.loop.post(lambda: 1 // 0)
    running.loop.call(lambda: None)
    assert [type(error) for error in running.errors] == [ZeroDivisionError]


def test_a_stopped_loop_takes_no_calls() -> None:
    running = Loop()
    running.loop.stop()
    running.loop.stop()
    with pytest.raises(StateError, match="has stopped"):
        running.loop.post(lambda: None)
    with pytest.raises(StateError, match="has stopped"):
        running.loop.call(lambda: None)
    running.loop.remove_reader(0)


def test_what_was_posted_before_stop_still_runs() -> None:
    running = Loop()
    seen: list[int] = []
    for number in range(10):
        running.loop.post(lambda number=number: seen.append(number))
    running.loop.stop()
    assert seen == list(range(10))


def test_the_loop_can_be_stopped_on_its_own_thread() -> None:
    running = Loop()
    running.loop.call(running.loop.stop)
    running.loop.stop()
    assert running.errors == []


def test_a_loop_that_never_started_can_be_stopped() -> None:
    DeviceLoop(lambda error: None).stop()


def test_calls_from_many_threads_all_return(running: Loop) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(running.loop.call(lambda: n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))


def test_stopping_while_others_post_and_remove_ends_without_an_error(event: EventFd) -> None:
    for _ in range(20):
        running = Loop()
        failures: list[BaseException] = []

        def pester(loop: DeviceLoop = running.loop, failures: list[BaseException] = failures) -> None:
            try:
                while True:
                    loop.add_reader(event.fd, lambda: None)
                    loop.remove_reader(event.fd)
                    loop.post(lambda: None)
            except StateError:
                return
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=pester)
        thread.start()
        time.sleep(0.001)
        running.loop.stop()
        thread.join()
        assert failures == []
