"""Console output on its way out: order, back-pressure, cancelling, a reader that has gone."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator

import pytest

from kvmlite.host.eventfd import EventFd
from kvmlite.host.sink import ConsoleSink


@pytest.fixture
def cancel() -> Iterator[EventFd]:
    event = EventFd()
    yield event
    event.close()


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """``[read end, write end]`` with room for two writes; a test that closes one puts -1 there."""
    ends = list(os.pipe2(os.O_CLOEXEC))
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 8192)
    yield ends
    for fd in ends:
        if fd >= 0:
            os.close(fd)


def unexpected(error: OSError) -> None:
    pytest.fail(f"on_broken({error!r})")


def test_output_is_written_and_remembered(cancel: EventFd, pipe: list[int]) -> None:
    sink = ConsoleSink(pipe[1], cancel, unexpected)
    sink(b"one ")
    sink(b"two")
    assert os.read(pipe[0], 100) == b"one two"
    assert sink.tail == b"one two"


def test_without_a_descriptor_output_is_only_remembered(cancel: EventFd) -> None:
    sink = ConsoleSink(-1, cancel, unexpected)
    sink(b"kept")
    assert sink.tail == b"kept"


@pytest.mark.parametrize("chunk", [1, 7, 10, 30, 1000])
def test_the_tail_is_the_last_bytes(cancel: EventFd, chunk: int) -> None:
    sink = ConsoleSink(-1, cancel, unexpected, tail_size=10)
    text = bytes(range(200)) * 5
    for start in range(0, len(text), chunk):
        sink(text[start : start + chunk])
    assert sink.tail == bytes(range(190, 200))


def test_a_slow_reader_gets_everything(cancel: EventFd, pipe: list[int]) -> None:
    sink = ConsoleSink(pipe[1], cancel, unexpected)
    text = os.urandom(40000)
    writer = threading.Thread(target=sink, args=(text,))
    writer.start()
    received = bytearray()
    while len(received) < len(text):
        received += os.read(pipe[0], 1500)
    writer.join()
    assert bytes(received) == text


def test_cancelling_releases_a_writer_that_waits(cancel: EventFd, pipe: list[int]) -> None:
    sink = ConsoleSink(pipe[1], cancel, unexpected)
    writer = threading.Thread(target=sink, args=(bytes(20000),))
    writer.start()
    writer.join(0.02)
    assert writer.is_alive()
    cancel.signal()
    writer.join(30)
    assert not writer.is_alive()
    assert len(sink.tail) == 20000


def test_a_deadline_releases_a_writer_that_waits(cancel: EventFd, pipe: list[int]) -> None:
    sink = ConsoleSink(pipe[1], cancel, unexpected)
    writer = threading.Thread(target=sink, args=(bytes(20000),))
    writer.start()
    sink.give_up_at(time.monotonic())
    writer.join(30)
    assert not writer.is_alive()


def test_a_cancelled_sink_still_writes_what_needs_no_waiting(cancel: EventFd, pipe: list[int]) -> None:
    cancel.signal()
    sink = ConsoleSink(pipe[1], cancel, unexpected)
    sink(b"last words")
    assert os.read(pipe[0], 100) == b"last words"


def test_a_reader_that_has_gone_is_reported_once(cancel: EventFd, pipe: list[int]) -> None:
    broken: list[OSError] = []
    sink = ConsoleSink(pipe[1], cancel, broken.append)
    os.close(pipe[0])
    pipe[0] = -1
    sink(b"lost")
    sink(b" again")
    assert [error.errno for error in broken] == [errno.EPIPE]
    assert sink.tail == b"lost again"


def test_a_full_disk_is_reported(cancel: EventFd) -> None:
    broken: list[OSError] = []
    fd = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    ConsoleSink(fd, cancel, broken.append)(b"x")
    os.close(fd)
    assert [error.errno for error in broken] == [errno.ENOSPC]


def test_a_non_blocking_descriptor_is_waited_for(cancel: EventFd, pipe: list[int]) -> None:
    os.set_blocking(pipe[1], False)
    sink = ConsoleSink(pipe[1], cancel, unexpected)
    writer = threading.Thread(target=sink, args=(b"x" * 20000,))
    writer.start()
    received = 0
    while received < 20000:
        received += len(os.read(pipe[0], 1000))
    writer.join()
    assert received == 20000
