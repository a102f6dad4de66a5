"""One command in the guest, seen from the host."""

from __future__ import annotations

import errno
import functools
import os
import threading
import time

from kvmlite.errors import HostError, KvmliteError, StateError
from kvmlite.guest import protocol
from kvmlite.guest.protocol import ProtocolError
from kvmlite.guest.sinks import Capture, is_broken_pipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.guest.sinks import Sink
    from kvmlite.guest.stdin import StdinSender
    from kvmlite.host.loop import DeviceLoop

OUTPUT_WINDOW = 1 << 20
"""Bytes of each output stream that may be on their way."""
_QUEUED_STDIN_MAX = 1 << 20

_STAGES = {
    protocol.STAGE_REQUEST: "request",
    protocol.STAGE_SETUP: "setup",
    protocol.STAGE_USER: "user",
    protocol.STAGE_CWD: "cwd",
    protocol.STAGE_EXEC: "exec",
}


class ExecFailed(KvmliteError):
    """The command did not start.

    Attributes:
        stage: What failed: ``request``, ``setup``, ``user``, ``cwd`` or ``exec``.
        errno: The guest's error number.
        exit_code: What a shell would say: 127 for a command not found, 126 for one that cannot be executed; 125 for
            the stages before.
    """

    def __init__(self, message: str, stage: str, error: int) -> None:
        super().__init__(message)
        self.stage = stage
        self.errno = error
        self.exit_code = 125 if stage != "exec" else 127 if error == errno.ENOENT else 126


class OutputStream:
    """One output stream on its way from the guest into a sink: credit, end, failure. Thread: the device loop's."""

    def __init__(self, stream: int, number: int, send: Callable[[bytes], None], on_change: Callable[[], None]) -> None:
        self._stream = stream
        self._number = number
        self._send = send
        self._on_change = on_change
        self._credit = OUTPUT_WINDOW
        self._unacknowledged = 0
        self._sink: Sink | None = None
        self.has_ended = False
        self.error: OSError | None = None

    def attach(self, sink: Sink | None) -> None:
        """Say where the bytes go; None drops them."""
        self._sink = sink

    @property
    def is_finished(self) -> bool:
        """The guest has sent the end and the sink has written all."""
        return self.has_ended and (self._sink is None or self._sink.is_drained)

    @property
    def is_drained(self) -> bool:
        """The sink has written all that has come."""
        return self._sink is None or self._sink.is_drained

    def take(self, payload: memoryview, flags: int) -> None:
        """The guest sent ``payload``.

        Raises:
            ProtocolError: More than it was allowed, or after the end.
        """
        size = len(payload)
        if self.has_ended or size > self._credit:
            allowed = 0 if self.has_ended else self._credit
            raise ProtocolError(f"exec {self._number}: {size} bytes of stream {self._stream}, {allowed} allowed")
        self._credit -= size
        self.has_ended = bool(flags & protocol.FLAG_EOF)
        if size:
            self.acknowledge(self._sink.write(payload) if self._sink else size)

    def acknowledge(self, size: int) -> None:
        """``size`` bytes are dealt with: in quarters of the window, the guest may send as many again."""
        self._unacknowledged += size
        if self._unacknowledged >= OUTPUT_WINDOW // 4 and not self.has_ended:
            self._send(protocol.encode_window(self._number, self._stream, self._unacknowledged))
            self._credit += self._unacknowledged
            self._unacknowledged = 0

    def written(self, size: int) -> None:
        """The sink wrote ``size`` bytes it had kept."""
        self.acknowledge(size)
        self._on_change()

    def fail(self, error: OSError) -> None:
        """The sink cannot write any more: the command sees a closed pipe, as it would without a VM in between."""
        if not is_broken_pipe(error):
            self.error = error
        if not self.has_ended:
            self._send(protocol.encode_close(self._number, self._stream))
        self._on_change()

    def close(self) -> None:
        """Let go of the sink."""
        if self._sink:
            self._sink.close()


class ExecHandle:
    """A running command; made by :meth:`AgentClient.exec`.

    Attributes:
        pid: In the guest; 0 until it is known.
        exit_code: Exit code, 128 + signal if a signal ended the command; None until then. Output may still follow.
        term_signal: The signal that ended it, 0 if none did.

    Thread: any, except that ``wait*`` and ``write_stdin`` must not run on the device loop's. What begins with an
    underscore belongs to the loop.
    """

    def __init__(
        self, argv: list[str], number: int, loop: DeviceLoop, send: Callable[[bytes], None], user: str, cwd: str
    ) -> None:
        self.argv = argv
        self._user = user
        self._cwd = cwd
        self.pid = 0
        self.exit_code: int | None = None
        self.term_signal = 0
        self._number = number
        self._loop = loop
        self._send = send
        self._stdout = OutputStream(protocol.STREAM_STDOUT, number, send, self._check_finished)
        self._stderr = OutputStream(protocol.STREAM_STDERR, number, send, self._check_finished)
        self._captures: tuple[Capture | None, Capture | None] = (None, None)
        self._stdin: StdinSender | None = None
        self._error: KvmliteError | None = None
        self._started = threading.Event()
        self._finished = threading.Event()
        self._stdin_drained = threading.Event()
        self._on_finished: Callable[[], None] | None = None

    @property
    def is_finished(self) -> bool:
        """The command has ended and all its output is written, or it will never be known."""
        return self._finished.is_set()

    @property
    def stdout(self) -> bytes:
        """Captured standard output so far; empty if it goes elsewhere."""
        return self._captures[0].data if self._captures[0] else b""

    @property
    def stderr(self) -> bytes:
        """Captured standard error so far; empty if it goes elsewhere."""
        return self._captures[1].data if self._captures[1] else b""

    @property
    def is_truncated(self) -> bool:
        """Captured output was more than its limit."""
        return any(capture is not None and capture.is_truncated for capture in self._captures)

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the command has ended and its output is written; its exit code.

        Raises:
            TimeoutError: It has not, within ``timeout_s``; it goes on.
            ExecFailed: It did not start.
            ChannelLost: The agent is gone and the outcome unknown.
            HostError: Output could not be written on the host (not for a closed pipe, which is the reader's choice).
        """
        if not self._finished.wait(timeout_s):
            raise TimeoutError(f"{self.argv[0]} (exec {self._number}): still running after {timeout_s} s")
        if self._error is not None:
            raise self._error
        for stream, name in ((self._stdout, "stdout"), (self._stderr, "stderr")):
            if stream.error is not None:
                raise HostError(f"writing {name} of {self.argv[0]}: {stream.error.strerror}", stream.error.errno or 0)
        if self.exit_code is None:
            raise StateError(f"{self.argv[0]} (exec {self._number}): ended without a status")
        return self.exit_code

    def wait_started(self, timeout_s: float | None = None) -> int:
        """Wait until the program runs; its pid. Raises as :meth:`wait` does."""
        if not self._started.wait(timeout_s):
            raise TimeoutError(f"{self.argv[0]} (exec {self._number}): not started after {timeout_s} s")
        if self._error is not None and not self.pid:
            raise self._error
        return self.pid

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group; nothing happens if it has ended."""
        self._post_frame(protocol.encode_signal(self._number, number))

    def resize(self, columns: int, rows: int) -> None:
        """Tell the command's terminal its size."""
        self._post_frame(protocol.encode_winsize(self._number, columns, rows))

    def write_stdin(self, data: bytes, timeout_s: float | None = None) -> None:
        """Send ``data`` to the command; waits while more than 1 MiB is queued.

        Raises:
            StateError: It was started without ``stdin="pipe"``.
            BrokenPipeError: It has ended or closed its input.
            TimeoutError: It did not read within ``timeout_s``.
        """
        stdin = self._stdin_pipe()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for start in range(0, len(data), _QUEUED_STDIN_MAX):
            if stdin.is_closed or self.is_finished:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), f"stdin of {self.argv[0]}")
            self._loop.call(functools.partial(self._queue_stdin, data[start : start + _QUEUED_STDIN_MAX]))
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._stdin_drained.wait(left):
                raise TimeoutError(f"{self.argv[0]} (exec {self._number}): does not read its input")

    def close_stdin(self) -> None:
        """End the command's input."""
        stdin = self._stdin_pipe()
        self._loop.post(stdin.end)

    def _stdin_pipe(self) -> StdinSender:
        if self._stdin is None:
            raise StateError(f'{self.argv[0]} (exec {self._number}): started without stdin="pipe"')
        return self._stdin

    def _queue_stdin(self, data: bytes) -> None:
        if self._stdin and not self._stdin.is_closed:
            self._stdin_drained.clear()
            self._stdin.queue(data)

    def _post_frame(self, frame: bytes) -> None:
        def send_if_running() -> None:
            if self.exit_code is None and not self.is_finished:
                self._send(frame)

        self._loop.post(send_if_running)

    def _take_started(self, pid: int, stdin_window: int) -> None:
        if self.pid or not pid:
            raise ProtocolError(f"exec {self._number}: STARTED with pid {pid}, has pid {self.pid}")
        self.pid = pid
        self._started.set()
        if self._stdin:
            self._stdin.grant(stdin_window)

    def _take_failed(self, stage: int, error: int) -> None:
        if self.pid or stage not in _STAGES or not 0 < error < 4096:
            raise ProtocolError(f"exec {self._number}: EXEC_FAILED with stage {stage}, errno {error}, pid {self.pid}")
        what = {protocol.STAGE_USER: f"user {self._user!r}", protocol.STAGE_CWD: f"directory {self._cwd!r}"}
        reason = os.strerror(error)
        if stage == protocol.STAGE_USER and error == errno.ENOENT:
            reason = "no such user or group in the guest"
        self._fail(ExecFailed(f"{what.get(stage, self.argv[0])}: {reason}", _STAGES[stage], error))

    def _take_output(self, stream: int, payload: memoryview, flags: int) -> None:
        output = self._stdout if stream == protocol.STREAM_STDOUT else self._stderr
        output.take(payload, flags)
        if output.has_ended:
            self._check_finished()

    def _take_exit(self, exit_code: int, term_signal: int) -> None:
        if self.exit_code is not None or not self.pid:
            raise ProtocolError(f"exec {self._number}: EXIT that cannot be (pid {self.pid}, exit {self.exit_code})")
        self.term_signal = term_signal
        self.exit_code = exit_code
        if self._stdin:
            self._stdin.close()
        self._check_finished()

    def _fail(self, error: KvmliteError) -> None:
        """The outcome will not be known. Output that has come is still written before waiters hear of it."""
        if self._error is None:
            self._error = error
        if self._stdin:
            self._stdin.close()
        self._check_finished()

    def _drop_output(self) -> None:
        """Nobody is going to write what the sinks still hold."""
        for stream in (self._stdout, self._stderr):
            stream.close()
            stream.attach(None)
        self._check_finished()

    def _check_finished(self) -> None:
        if self._finished.is_set():
            return
        ended = self.exit_code is not None and self._stdout.is_finished and self._stderr.is_finished
        failed = self._error is not None and self._stdout.is_drained and self._stderr.is_drained
        if not ended and not failed:
            return
        if ended:
            self._error = None
        self._stdout.close()
        self._stderr.close()
        if self._on_finished:
            self._on_finished()
        self._started.set()
        self._finished.set()
        self._stdin_drained.set()
