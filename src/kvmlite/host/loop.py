"""One thread for all devices that live in Python: epoll over their file descriptors, and a queue of calls.

Two devices on the same loop never run at the same time, so a device needs no lock for what only the loop touches.
"""

from __future__ import annotations

import _thread
import os
import select

from kvmlite._native import lib
from kvmlite.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


class _Call:
    """A function on its way to the loop, and its result on the way back."""

    __slots__ = ("done", "error", "function", "result")

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.result: object = None
        self.error: BaseException | None = None
        self.done = _thread.allocate_lock()
        self.done.acquire()

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # handed to the caller, whatever it is
            self.error = error
        self.done.release()


class DeviceLoop:
    """The device thread of one machine.

    Args:
        on_error: Called on the loop thread with an exception that escaped a callback: a bug of ours, which ends the
            machine. The loop goes on, so that ``call`` and ``stop`` still work.

    Thread: ``start`` and ``stop`` belong to the machine; all else any thread. Owns its epoll and wake-up descriptors.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._epoll = select.epoll()
            self._epoll.register(self._wake_fd, select.EPOLLIN)
        except BaseException:
            os.close(self._wake_fd)
            raise
        self._lock = _thread.allocate_lock()
        self._callbacks: dict[int, list[Callable[[], None] | None]] = {}  # fd -> [on readable, on writable]
        self._files: set[int] = set()  # regular files and the like: always ready, unknown to epoll
        self._posted: list[Callable[[], object]] = []
        self._thread_id = 0
        self._started = False
        self._stopping = False
        self._stopped = _thread.allocate_lock()

    def start(self) -> None:
        """Start the thread."""
        self._stopped.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # the system has no more threads
            self._stopped.release()
            raise
        self._started = True

    def stop(self) -> None:
        """End the thread and close the loop's own descriptors. Callbacks left behind are dropped.

        On the loop's own thread this returns at once, and the loop ends after the callback under way.
        """
        with self._lock:
            if self._epoll.closed:
                return
            self._stopping = True
            self._wake()
        if not self._started:
            self._close()
        elif not self.is_current():
            self._wait_stopped()

    def _wait_stopped(self) -> None:
        with self._stopped:
            pass

    def _close(self) -> None:
        with self._lock:
            self._thread_id = 0  # the system may give the number to another thread
            self._callbacks.clear()
            self._files.clear()
            self._epoll.close()
            os.close(self._wake_fd)

    def is_current(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return self._thread_id == _thread.get_ident()

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever ``fd`` is readable (level-triggered) or closed by its peer."""
        self._set(fd, 0, callback)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever ``fd`` is writable (level-triggered)."""
        self._set(fd, 1, callback)

    def remove_reader(self, fd: int) -> None:
        """Forget the reader; once this returns its callback does not run any more. Unknown fds are fine."""
        self._set(fd, 0, None)
        self._barrier()

    def remove_writer(self, fd: int) -> None:
        """Forget the writer; once this returns its callback does not run any more. Unknown fds are fine."""
        self._set(fd, 1, None)
        self._barrier()

    def post(self, function: Callable[[], object]) -> None:
        """Run ``function`` on the loop's thread, soon; does not wait.

        Raises:
            StateError: The loop has stopped.
        """
        with self._lock:
            if self._stopping:
                raise StateError("the device loop has stopped")
            self._posted.append(function)
            self._wake()

    def call(self, function: Callable[[], T], timeout_s: float = 5.0) -> T:
        """Run ``function`` on the loop's thread, wait for it, return its result or raise its exception.

        Raises:
            StateError: The loop has stopped, or did not get to it in time.
        """
        if self.is_current():
            return function()
        call = _Call(function)
        self.post(call.run)
        if not call.done.acquire(timeout=timeout_s):
            raise StateError(f"the device loop did not answer within {timeout_s:g} s")
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[return-value]

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _barrier(self) -> None:
        """Wait until a callback that may be running now has returned."""
        if not self._thread_id or self.is_current():
            return
        if self._stopping:
            self._wait_stopped()
            return
        try:
            self.call(lambda: None)
        except StateError:
            if not self._stopping:
                raise
            self._wait_stopped()

    def _set(self, fd: int, which: int, callback: Callable[[], None] | None) -> None:
        with self._lock:
            if self._epoll.closed:
                return
            known = fd in self._callbacks
            entry = self._callbacks.setdefault(fd, [None, None])
            entry[which] = callback
            events = (select.EPOLLIN if entry[0] else 0) | (select.EPOLLOUT if entry[1] else 0)
            if not events:
                del self._callbacks[fd]
                if fd in self._files:
                    self._files.discard(fd)
                elif known:
                    self._epoll.unregister(fd)
            elif fd in self._files:
                pass
            elif known:
                self._epoll.modify(fd, events)
            else:
                self._register(fd, events)

    def _register(self, fd: int, events: int) -> None:
        try:
            self._epoll.register(fd, events)
        except PermissionError:  # epoll(7): regular files and /dev/null cannot be waited for, they are always ready
            self._files.add(fd)
            self._wake()
        except OSError:
            del self._callbacks[fd]
            raise

    def _run(self) -> None:
        self._thread_id = _thread.get_ident()
        lib.kvl_thread_set_name(b"device-loop")
        while not self._stopping:
            files = [(fd, select.EPOLLIN | select.EPOLLOUT) for fd in tuple(self._files)]
            is_woken = False
            for fd, events in self._epoll.poll(0 if files else -1) + files:
                if self._stopping:
                    break
                if fd == self._wake_fd:
                    is_woken = True  # last: who was told that a reader is gone may use its number again
                else:
                    self._run_callbacks(fd, events)
            if is_woken:
                os.eventfd_read(self._wake_fd)
                self._run_posted()
        self._run_posted()
        self._close()
        self._stopped.release()

    def _run_posted(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for function in posted:
            self._guarded(function)

    def _run_callbacks(self, fd: int, events: int) -> None:
        gone = events & (select.EPOLLHUP | select.EPOLLERR)
        for which, wanted in ((0, select.EPOLLIN), (1, select.EPOLLOUT)):
            entry = self._callbacks.get(fd)  # looked up again: the first callback may have removed the second
            callback = entry[which] if entry else None
            if callback is not None and (events & wanted or gone):
                self._guarded(callback)

    def _guarded(self, function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # a thread's top: the machine ends, wait() reports it
            self._on_error(error)
