"""A device loop without a thread: it runs when the test says so, so nothing happens at an odd moment."""

from __future__ import annotations

import select
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class ManualLoop:
    """Same face as ``kvmlite.host.loop.DeviceLoop``; ``run()`` is its thread.

    An exception of a callback comes out of ``run()``.
    """

    def __init__(self) -> None:
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._poller = select.poll()
        self._posted: deque[Callable[[], object]] = deque()
        self._lock = threading.RLock()  # as with DeviceLoop, a reader that another thread has removed is not called
        self.rounds = 0

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """See DeviceLoop."""
        with self._lock:
            self._readers[fd] = callback
            self._watch(fd)

    def remove_reader(self, fd: int) -> None:
        """See DeviceLoop."""
        with self._lock:
            if self._readers.pop(fd, None) is not None:
                self._watch(fd)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        """See DeviceLoop."""
        with self._lock:
            self._writers[fd] = callback
            self._watch(fd)

    def remove_writer(self, fd: int) -> None:
        """See DeviceLoop."""
        with self._lock:
            if self._writers.pop(fd, None) is not None:
                self._watch(fd)

    def _watch(self, fd: int) -> None:
        events = (select.POLLIN if fd in self._readers else 0) | (select.POLLOUT if fd in self._writers else 0)
        if events:
            self._poller.register(fd, events)
        else:
            self._poller.unregister(fd)

    def post(self, function: Callable[[], object]) -> None:
        """See DeviceLoop."""
        with self._lock:
            self._posted.append(function)

    def call(self, function: Callable[[], T], timeout_s: float = 5.0) -> T:
        """Run it here and now."""
        return function()

    def is_current(self) -> bool:
        """Whether the caller runs on the loop's thread: there is no other."""
        return True

    @property
    def watched(self) -> set[int]:
        """Descriptors in the poll set."""
        return set(self._readers) | set(self._writers)

    def is_reading(self, fd: int) -> bool:
        """Whether somebody waits for ``fd`` to become readable."""
        return fd in self._readers

    def run(self, max_rounds: int = 10_000) -> int:
        """Serve whatever is ready until nothing is; returns the number of rounds.

        Raises:
            AssertionError: It does not come to rest: a busy loop.
        """
        for done in range(max_rounds):
            if not self.run_once():
                return done
        raise AssertionError(f"the device loop is still busy after {max_rounds} rounds")

    def run_once(self) -> bool:
        """Serve what is ready now; returns whether anything was."""
        with self._lock:
            self.rounds += 1
            posted = self._posted
            if posted:
                self._posted = deque()
                for function in posted:
                    function()
            return self._poll() or bool(posted)

    def _poll(self) -> bool:
        ready = self._poller.poll(0)
        for fd, events in ready:
            gone = events & (select.POLLHUP | select.POLLERR | select.POLLNVAL)
            if (events & select.POLLIN or gone) and fd in self._readers:
                self._readers[fd]()
            if (events & select.POLLOUT or gone) and fd in self._writers:
                self._writers[fd]()
        return bool(ready)
