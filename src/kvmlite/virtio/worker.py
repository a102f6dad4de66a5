"""A thread that serves queues in C, and comes back to Python when there is something to decide."""

from __future__ import annotations

import os
import select
import threading

from kvmlite._native import ffi, lib
from kvmlite.errors import StateError
from kvmlite.host.eventfd import EventFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STOP_TIMEOUT_S = 30.0
"""A handler returns when its request does; a request of the host's kernel ends within this, or is stuck for good."""


class QueueWorker:
    """One thread in ``kvl_worker_run``. A device adds its sources to ``native`` in C, then starts the worker.

    Args:
        name: Of the thread.
        on_return: Told what ``kvl_worker_run`` returned, and the number of the source; for a broken queue that is
            ``KVL_WORKER_QUEUE_FAULT``. Returns whether the worker goes on. Runs on the worker's thread.
        on_stop: Called on the worker's thread when it stops, before ``stop`` returns.
        spin_max_us: How long the thread looks for more work before it sleeps, at most; 0 for not at all.
            On a host with one processor it never does: nobody could bring work meanwhile.

    Thread: ``start`` and ``stop`` a vCPU's or the machine's, one at a time.
    """

    def __init__(
        self,
        name: str,
        on_return: Callable[[int, int], bool],
        *,
        on_stop: Callable[[], None] | None = None,
        spin_max_us: float = 0.0,
    ) -> None:
        self._name = name
        self._on_return = on_return
        self._on_stop = on_stop
        self._stop_event = EventFd()
        self._native = ffi.new("struct kvl_worker *")
        self._thread: threading.Thread | None = None
        can_spin = len(os.sched_getaffinity(0)) > 1
        lib.kvl_worker_init(self._native, self._stop_event.fd, int(spin_max_us * 1000) if can_spin else 0)

    @property
    def native(self) -> Any:
        """``struct kvl_worker *``; its sources may be changed while it does not run."""
        return self._native

    @property
    def is_running(self) -> bool:
        """Whether its thread has been started and not stopped."""
        return self._thread is not None

    @property
    def is_idle(self) -> bool:
        """Whether all that was announced before the call is served and nothing is announced now. Any thread."""
        native = self._native
        if self._thread is None:
            return True
        sleep = native.sleeps
        if not lib.kvl_worker_is_waiting(native):
            return False
        watched = [(native.fds[index].fd, native.fds[index].events) for index in range(native.count)]
        fds = select.poll()
        for fd, events in watched:
            if fd >= 0:
                fds.register(fd, events)
        # Still the same sleep: what is watched has not changed meanwhile, and nothing has come.
        return not fds.poll(0) and bool(lib.kvl_worker_is_waiting(native)) and native.sleeps == sleep

    def is_idle_with(self, condition: Callable[[], bool]) -> bool:
        """Whether it is idle and ``condition`` true at the same moment: it looks at what the thread writes. Any thread."""
        sleep = self._native.sleeps
        return self.is_idle and condition() and self.is_idle and self._native.sleeps == sleep

    def start(self) -> None:
        """Start serving; each queue is looked at once, kicked or not.

        Raises:
            RuntimeError: The host has no more threads.
        """
        if self._thread is not None:
            raise StateError(f"{self._name} has been started already")
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the host has no more threads
            self._thread = None
            raise

    def _run(self) -> None:
        lib.kvl_thread_set_name(self._name.encode()[:15])
        goes_on = True
        while goes_on:
            code = lib.kvl_worker_run(self._native)
            goes_on = code != lib.KVL_WORKER_STOPPED and self._on_return(code, self._native.returned_source)
        if self._on_stop is not None:
            self._on_stop()

    def stop(self) -> None:
        """End the thread; what its handler is at has ended when this returns. Harmless when it does not run.

        Raises:
            StateError: It did not end in time: the host holds a request of it.
        """
        thread = self._thread
        if thread is None:
            return
        self._stop_event.signal()
        thread.join(STOP_TIMEOUT_S)
        if thread.is_alive():
            raise StateError(f"{self._name} has not stopped for {STOP_TIMEOUT_S:g} s: the host holds a request of it")
        self._thread = None
        self._stop_event.drain()

    def close(self) -> None:
        """Stop, and give the descriptors back."""
        self.stop()
        self._stop_event.close()
