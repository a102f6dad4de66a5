"""What a process prints, awaited."""

from __future__ import annotations

import os
import selectors
import subprocess
import time

from benchkit.measure import MeasureError


class Lines:
    """Output of a process, and the time it came.

    Args:
        process: With a pipe as its stdout.
        limit_s: Until all that is waited for has come.
    """

    def __init__(self, process: subprocess.Popen[bytes], limit_s: float) -> None:
        assert process.stdout is not None
        self._fd = process.stdout.fileno()
        self._name = str(process.args[0]) if isinstance(process.args, list) else ""
        self._seen = b""
        self._deadline = time.monotonic() + limit_s

    def wait_for(self, end: bytes, limit_s: float | None = None) -> tuple[bytes, float]:
        """Everything up to ``end``, and when it came.

        Args:
            end: What is printed last.
            limit_s: From now on, instead of the limit of all.

        Raises:
            MeasureError: It did not come in time.
        """
        deadline = self._deadline if limit_s is None else time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._fd, selectors.EVENT_READ)
            while end not in self._seen:
                left = deadline - time.monotonic()
                data = os.read(self._fd, 65536) if left > 0 and selector.select(left) else b""
                if not data:
                    raise MeasureError(f"{self._name}: no {end!r} from the guest; it printed {self._seen[-1500:]!r}")
                self._seen += data
        now = time.monotonic()
        found, _, self._seen = self._seen.partition(end)
        return found, now
