"""Host side of the guest agent: run commands in the guest, set its clock, end it.

The client runs on the machine's device loop, next to the device that carries its channel, so bytes pass from the
guest's vsock to the caller's file descriptor on one thread. Its methods may be called from any other thread.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
import time

from kvmlite.errors import ConfigError, KvmliteError
from kvmlite.guest import protocol
from kvmlite.guest.channel import Channel, ChannelLost
from kvmlite.guest.execution import OUTPUT_WINDOW, ExecFailed, ExecHandle, OutputStream
from kvmlite.guest.network import encode_settings
from kvmlite.guest.protocol import Hello, ProtocolError
from kvmlite.guest.sinks import CallbackSink, Capture, FdSink
from kvmlite.guest.stdin import StdinSender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    from kvmlite.guest.network import NetworkSettings
    from kvmlite.guest.sinks import Sink
    from kvmlite.host.loop import DeviceLoop

    Output = int | Callable[[bytes], object] | Capture | None
    Input = bytes | int | Literal["pipe"] | None

__all__ = ["AgentClient", "Capture", "ChannelLost", "ExecFailed", "ExecHandle", "GuestError", "Hello"]


class GuestError(KvmliteError):
    """The guest's kernel refused something the agent did for us.

    Attributes:
        errno: The guest's error number.
    """

    def __init__(self, message: str, error: int) -> None:
        super().__init__(f"{message}: {os.strerror(error)}")
        self.errno = error


def _encode_exec(
    number: int,
    argv: Sequence[str],
    env: Mapping[str, str],
    user: str,
    cwd: str,
    flags: int,
    cells: tuple[int, int],
) -> bytes:
    """EXEC as frames; what cannot be encoded is the caller's mistake."""
    try:
        return protocol.encode_exec(
            number,
            [os.fsencode(argument) for argument in argv],
            {os.fsencode(name): os.fsencode(value) for name, value in env.items()},
            user=os.fsencode(user),
            cwd=os.fsencode(cwd),
            flags=flags,
            cells=cells,
            windows=(OUTPUT_WINDOW, OUTPUT_WINDOW),
        )
    except (ValueError, struct.error) as error:
        raise ConfigError(f"exec: {error}") from error


class _Request:
    """A question to the agent and the answer, when it has come."""

    def __init__(self, answer_kind: int) -> None:
        self.answer_kind = answer_kind
        self.value = 0
        self.error: KvmliteError | None = None
        self.done = threading.Event()


class AgentClient:
    """The agent of one running guest.

    Args:
        fd: Full-duplex byte stream to the agent; owned by the client from now on.
        loop: The machine's device loop; it has to run until ``close()``.
        on_lost: Called on the loop's thread, once, when the channel has ended for whatever reason but ``close()``.

    Thread: any but the loop's own, for everything that waits.
    """

    def __init__(self, fd: int, loop: DeviceLoop, *, on_lost: Callable[[ChannelLost], None] | None = None) -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._execs: dict[int, ExecHandle] = {}
        self._requests: dict[int, _Request] = {}
        self._hello: Hello | None = None
        self._hello_came = threading.Event()
        self._lost: ChannelLost | None = None
        self._channel = Channel(fd, loop, self._take_frame, self._end)
        loop.post(self._open)

    @property
    def lost(self) -> ChannelLost | None:
        """Why the channel has ended; None while it works."""
        return self._lost

    def hello(self, timeout_s: float | None = None) -> Hello:
        """Wait for the agent to say who it is.

        Raises:
            TimeoutError: It did not, within ``timeout_s``.
            ChannelLost: The channel ended before.
        """
        if not self._hello_came.wait(timeout_s):
            raise TimeoutError(f"no word from the guest agent within {timeout_s} s")
        if self._hello is None:
            raise self._lost or ChannelLost("the channel ended before HELLO")
        return self._hello

    def exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        tty: tuple[int, int] | None = None,
        stdin: Input = None,
        stdout: Output | Literal["capture"] = "capture",
        stderr: Output | Literal["capture", "stdout"] = "capture",
    ) -> ExecHandle:
        """Start a command; returns at once, also before the guest is up.

        Args:
            argv: Program and arguments; a name without a slash is looked up in the guest along ``env``'s PATH.
            env: The whole environment; PATH, HOME, USER and LOGNAME are added if absent.
            cwd: Directory in the guest; "" is the root directory.
            user: ``name``, ``uid``, either with ``:group`` or ``:gid``; "" is root.
            tty: (columns, rows) of a terminal to run it on; stderr is then part of stdout.
            stdin: Bytes, a file descriptor to read, ``"pipe"`` for ``write_stdin``, None for ``/dev/null`` (with a
                terminal: no input).
            stdout, stderr: ``"capture"``, a ``Capture`` with a limit, a file descriptor (the caller's; open until the
                command has ended), a function called with bytes on the loop's thread, or None to drop;
                stderr may be ``"stdout"``.

        Raises:
            ConfigError: Nothing to run, a NUL inside a string, or more than 1 MiB of arguments and environment.
            ChannelLost: The agent is gone.
        """
        if self._lost is not None:
            raise self._lost
        number = self._next_number()
        merged = tty is not None or stderr == "stdout"
        flags = (protocol.EXEC_TTY if tty else 0) | (protocol.EXEC_MERGE if merged else 0)
        if stdin is not None:
            flags |= protocol.EXEC_STDIN
        frames = _encode_exec(number, argv, env or {}, user, cwd, flags, tty or (0, 0))
        handle = ExecHandle(list(argv), number, self._loop, self._channel.send, user, cwd)
        handle._stderr.has_ended = merged
        try:
            stdout_capture = self._attach(handle._stdout, stdout)
            stderr_capture = None if merged else self._attach(handle._stderr, stderr)
            handle._captures = (stdout_capture, stderr_capture)
            if stdin is not None:
                self._attach_stdin(handle, stdin)
            self._loop.post(lambda: self._start(handle, frames))
        except BaseException:  # a bad descriptor, a loop that has stopped: let go of what was opened
            handle._stdout.close()
            handle._stderr.close()
            raise
        return handle

    def ping(self, timeout_s: float = 5.0) -> int:
        """Ask the agent for a sign of life; the guest's CLOCK_MONOTONIC in nanoseconds."""
        return self._ask(protocol.PONG, "ping", lambda number: protocol.encode(protocol.PING, number), timeout_s)

    def set_clock(self, time_ns: int | None = None, timeout_s: float = 5.0) -> None:
        """Step the guest's real-time clock to ``time_ns`` since 1970; default: the host's time."""
        wanted = time.time_ns() if time_ns is None else time_ns
        self._order("setting the clock", lambda number: protocol.encode_clock_set(number, wanted), timeout_s)

    def add_entropy(self, data: bytes | None = None, timeout_s: float = 5.0) -> None:
        """Feed and reseed the guest's random generator; default: 64 bytes of the host's."""
        seed = os.urandom(64) if data is None else data
        self._order("adding entropy", lambda number: protocol.encode_entropy(number, seed), timeout_s)

    def mount(
        self,
        source: str,
        target: str,
        kind: str,
        data: str = "",
        flags: int = 0,
        *,
        name: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        """Mount a file system in the guest; makes the directory ``target``.

        Args:
            source: A device; or ``serial:NAME`` for the virtio disk with this serial, ``mmio:ADDRESS`` (hexadecimal) for the one
                that has its registers there; ``:2`` behind it for its partition 2.
            flags: Those of mount(2).
            name: What an error calls the source.

        Raises:
            GuestError: The guest's kernel refused; ENODEV also if there is no such disk.
        """
        fields = [os.fsencode(text) for text in (source, target, kind, data)]
        self._order(
            f"mounting {name or kind + ' ' + source} at {target}",
            lambda number: protocol.encode_mount(number, fields, flags),
            timeout_s,
        )

    def make_directory(self, path: str, timeout_s: float = 30.0) -> None:
        """Make a directory in the guest, and those above it; one that is there already is left as it is.

        Raises:
            GuestError: The guest's kernel refused.
        """
        wanted = os.fsencode(path)
        self._order(f"making {path}", lambda number: protocol.encode_mkdir(number, wanted), timeout_s)

    def change_root(self, directory: str, timeout_s: float = 30.0) -> None:
        """Make a mounted file system the root of the guest.

        Every process of the guest moves there; ``/dev``, ``/proc`` and ``/sys`` with what is mounted below them go along,
        all else of the initial root (busybox too) is gone. Users of ``exec`` are looked up in the new root from now on.

        Args:
            directory: A mount point in the guest; directories for the three are made if they are missing.

        Raises:
            GuestError: EBUSY or EINVAL if it is no mount point; EROFS if it is read-only and lacks one of the directories.
        """
        path = os.fsencode(directory)
        self._order(
            f"making {directory} the root directory", lambda number: protocol.encode_root(number, path), timeout_s
        )

    def sync(self, timeout_s: float = 60.0) -> None:
        """Wait until what the guest has written has reached its disks."""
        self._order("writing to the guest's disks", lambda number: protocol.encode(protocol.SYNC, number), timeout_s)

    def configure_network(self, settings: NetworkSettings, timeout_s: float = 15.0) -> None:
        """Configure an interface of the guest: MTU, addresses, routes, up; then ``/etc/resolv.conf``.

        A file below ``/run`` that ``/etc/resolv.conf`` links to is made; on a read-only root the file is laid over it.

        Raises:
            GuestError: ENODEV if no interface with this MAC appeared within a second.
        """
        payload = encode_settings(settings)
        self._order(
            f"configuring the interface {settings.mac}",
            lambda number: protocol.encode(protocol.NETWORK, number, payload),
            timeout_s,
        )

    def shutdown(self, kind: Literal["poweroff", "reboot", "halt"] = "poweroff", timeout_s: float = 5.0) -> None:
        """Make the guest end; returns once the agent has agreed. Commands get SIGTERM and a second, then SIGKILL."""
        value = protocol.SHUTDOWN_KINDS[kind]
        self._order(kind, lambda number: protocol.encode_shutdown(number, value), timeout_s)

    def close(self) -> None:
        """Close the channel; commands still running are lost, and an agent that is PID 1's powers the guest off.

        Output that its reader has not taken by now is dropped.
        """
        self._on_lost = None
        self._loop.call(lambda: self._finish("closed by the host"))

    def release(self) -> None:
        """Once the loop has stopped: close what it did not get to, and tell those who still wait."""
        self._on_lost = None
        self._finish("the guest has ended")

    def _finish(self, reason: str) -> None:
        unfinished = list(self._execs.values())
        self._channel.end(reason)
        for handle in unfinished:
            handle._drop_output()

    def _next_number(self) -> int:
        while True:
            number = next(self._numbers) & 0xFFFFFFFF
            if number and number not in self._execs and number not in self._requests:
                return number

    def _attach(self, stream: OutputStream, target: Output | str) -> Capture | None:
        """Give a stream its sink; the capture, if it is one."""
        sink: Sink | None
        if target is None:
            sink = None
        elif isinstance(target, int):
            sink = FdSink(target, self._loop, stream.written, stream.fail)
        elif isinstance(target, Capture):
            sink = target
        elif callable(target):
            sink = CallbackSink(target)
        else:
            sink = Capture()
        stream.attach(sink)
        return sink if isinstance(sink, Capture) else None

    def _attach_stdin(self, handle: ExecHandle, stdin: Input) -> None:
        source_fd = stdin if isinstance(stdin, int) else -1
        sender = StdinSender(handle._number, self._loop, self._channel.send, source_fd, handle._stdin_drained.set)
        if isinstance(stdin, bytes):
            self._loop.post(lambda: sender.queue(stdin, is_last=True))
        handle._stdin = sender

    def _ask(self, answer_kind: int, what: str, encode: Callable[[int], bytes], timeout_s: float) -> int:
        if self._lost is not None:
            raise self._lost
        request = _Request(answer_kind)
        number = self._next_number()

        def start() -> None:
            if self._lost is not None:
                request.error = self._lost
                request.done.set()
                return
            self._requests[number] = request
            self._channel.send(encode(number))

        self._loop.post(start)
        if not request.done.wait(timeout_s):
            raise TimeoutError(f"{what}: no answer from the guest agent within {timeout_s:g} s")
        if request.error is not None:
            raise request.error
        return request.value

    def _order(self, what: str, encode: Callable[[int], bytes], timeout_s: float) -> None:
        error = self._ask(protocol.RESULT, what, encode, timeout_s)
        if error:
            raise GuestError(what, error)

    # On the loop's thread from here on.

    def _open(self) -> None:
        self._channel.send(protocol.encode_hello())
        self._channel.open()

    def _start(self, handle: ExecHandle, frames: bytes) -> None:
        if self._lost is not None:
            handle._fail(self._lost)
            return
        self._execs[handle._number] = handle
        handle._on_finished = lambda: self._forget(handle)
        self._channel.send(frames)

    def _forget(self, handle: ExecHandle) -> None:
        self._execs.pop(handle._number, None)

    def _take_frame(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        if self._hello is None and kind not in (protocol.HELLO, protocol.ERROR):
            raise ProtocolError(f"message {kind} before HELLO")
        if kind in (protocol.STDOUT, protocol.STDERR):
            stream = protocol.STREAM_STDOUT if kind == protocol.STDOUT else protocol.STREAM_STDERR
            self._exec(number)._take_output(stream, payload, flags)
        elif kind == protocol.HELLO:
            if self._hello is not None:
                raise ProtocolError("HELLO twice")
            self._hello = protocol.decode_hello(payload)
            self._channel.begin_sending()
            self._hello_came.set()
        elif kind in (protocol.PONG, protocol.RESULT):
            self._answer(kind, number, payload)
        elif kind == protocol.ERROR:
            raise ProtocolError(f"the agent says: {protocol.decode_text(payload)}")
        else:
            self._take_exec_message(kind, self._exec(number), payload)

    def _take_exec_message(self, kind: int, handle: ExecHandle, payload: memoryview) -> None:
        if kind == protocol.STARTED:
            handle._take_started(*protocol.decode_words(kind, payload))
        elif kind == protocol.EXEC_FAILED:
            handle._take_failed(*protocol.decode_words(kind, payload))
        elif kind == protocol.EXIT:
            handle._take_exit(*protocol.decode_exit(payload))
        elif kind in (protocol.WINDOW, protocol.CLOSE):
            stream, size = protocol.decode_words(kind, payload)
            if stream != protocol.STREAM_STDIN or handle._stdin is None:
                raise ProtocolError(f"exec {handle._number}: message {kind} for stream {stream}")
            if kind == protocol.WINDOW:
                handle._stdin.grant(size)
            else:
                handle._stdin.close()
        else:
            raise ProtocolError(f"message of unknown type {kind}")

    def _exec(self, number: int) -> ExecHandle:
        handle = self._execs.get(number)
        if handle is None:
            raise ProtocolError(f"message for exec {number}, which is not running")
        return handle

    def _answer(self, kind: int, number: int, payload: memoryview) -> None:
        request = self._requests.pop(number, None)
        if request is None or request.answer_kind != kind:
            raise ProtocolError(f"answer {kind} to request {number}, which was not asked")
        request.value = protocol.decode_pong(payload) if kind == protocol.PONG else protocol.decode_result(payload)
        request.done.set()

    def _end(self, reason: ChannelLost) -> None:
        self._lost = reason
        on_lost, self._on_lost = self._on_lost, None  # before anybody wakes, who may close the client
        self._hello_came.set()
        for handle in list(self._execs.values()):
            handle._fail(reason)
        for request in self._requests.values():
            request.error = reason
            request.done.set()
        self._requests.clear()
        if on_lost is not None:
            on_lost(reason)
