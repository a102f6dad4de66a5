"""The states of a machine, and the one table of how it moves between them."""

from __future__ import annotations

import _thread

from kvmlite.errors import StateError

NEW = "new"
READY = "ready"
RUNNING = "running"
PAUSED = "paused"
STOPPED = "stopped"

# verb -> {state it may be in: state it goes to}
TRANSITIONS = {
    "build": {NEW: READY},
    "start": {READY: RUNNING},
    "pause": {RUNNING: PAUSED},
    "resume": {PAUSED: RUNNING},
    "stop": {NEW: STOPPED, READY: STOPPED, RUNNING: STOPPED, PAUSED: STOPPED},
}


class Lifecycle:
    """State of one machine. Any thread."""

    def __init__(self) -> None:
        self.state = NEW
        self._lock = _thread.allocate_lock()

    def go(self, verb: str) -> None:
        """Move on.

        Raises:
            StateError: The table has no such move from here.
        """
        with self._lock:
            target = TRANSITIONS[verb].get(self.state)
            if target is None:
                raise StateError(f"cannot {verb} a machine that is {self.state}")
            self.state = target


class Latch:
    """A one-shot event: once set it stays set. Any thread."""

    __slots__ = ("_lock", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let everybody through, now and later. Setting twice is harmless."""
        if not self.is_set:
            self.is_set = True
            self._open()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until set; whether it is."""
        if self.is_set:
            return True
        if not self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            return self.is_set
        self._open()
        return True

    def _open(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:  # another thread that set it, or waited, at the same moment has released it
            pass
