"""One session: the five ports of a running lab, and the streams of this process.

Messages are described in ``init/lab.h``. Each data stream has its own
thread, so that a slow reader of one never holds up another; the control port is read by the
main thread, which also keeps the deadlines.
"""

import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from labkit.qemu import STREAMS, heartbeats

_CHUNK = 1 << 18
#: How long an emulated CPU that has lost an interrupt stands still, at most. Each beat costs some 0.3 ms.
_HEARTBEAT_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the lab is asked to do, in its own terms.

    ``mounts`` are (slot, path, read_only); ``binds`` are paths that came in the tree archive;
    ``links`` are (target, link).
    """

    command: list[str]
    environment: dict[str, str]
    directory: Path
    mounts: list[tuple[str, Path, bool]] = field(default_factory=list)
    binds: list[Path] = field(default_factory=list)
    links: list[tuple[Path, str]] = field(default_factory=list)
    out: Path | None = None
    has_terminal: bool = False

    def encode(self) -> bytes:
        """Return the payload of the S message."""
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        items = [f"c{seconds} {nanoseconds}", f"r{os.urandom(64).hex()}", "utree"]
        # a mount may lie inside another one: parents first
        places = [(path, f"m{'ro' if ro else 'rw'} {serial} {path}") for serial, path, ro in self.mounts]
        places += [(path, f"b{path}") for path in self.binds]
        items += [item for _, item in sorted(places, key=lambda place: len(place[0].parts))]
        items += [f"l{target} {link}" for target, link in self.links]
        items += [f"e{name}={value}" for name, value in self.environment.items()]
        items += [f"d{self.directory}"]
        items += [f"o{self.out}"] if self.out else []
        items += ["t{} {}".format(*_window_size())] if self.has_terminal else []
        items += [f"a{word}" for word in self.command]
        return b"".join(os.fsencode(item) + b"\0" for item in items)


class LostLab(Exception):
    """The machine ended, or the session in it, before the command did."""


class OutOfTime(Exception):
    """The deadline passed."""


class Ports:
    """Socket pairs to the ports of a lab of so many CPUs: one end is ours, the other is handed to QEMU."""

    def __init__(self, cpus: int) -> None:
        self._heartbeats = heartbeats(cpus)
        pairs = {name: socket.socketpair() for name in (*STREAMS, *self._heartbeats)}
        for ours, theirs in pairs.values():
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.ours = {name: pair[0] for name, pair in pairs.items()}
        self._theirs = {name: pair[1] for name, pair in pairs.items()}

    def fds(self) -> dict[str, int]:
        """Descriptors for QEMU; ``handed_over()`` closes them here."""
        return {name: end.fileno() for name, end in self._theirs.items()}

    def handed_over(self) -> None:
        """QEMU has its ends now. Closed here, so that its death shows as an end of file."""
        for end in self._theirs.values():
            end.close()

    def start_heartbeats(self) -> None:
        """Interrupt each emulated CPU from now on, until the machine ends: see ``init/heartbeat.c``."""
        ports = [self.ours[name] for name in self._heartbeats]
        threading.Thread(target=_beat, args=(ports,), daemon=True).start()


def _beat(ports: list[socket.socket]) -> None:
    while True:
        for port in ports:
            try:
                port.send(b".", socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # it has enough of them to read
            except OSError:
                return  # the machine ended, which shows elsewhere
        time.sleep(_HEARTBEAT_S)


class _Drain:
    """Thread that passes on what one port brings, and counts it."""

    def __init__(self, port: socket.socket, write: Callable[[bytes], None], on_break: Callable[[], None]) -> None:
        self._port, self._write, self._on_break = port, write, on_break
        self._count = 0
        self._is_broken = False
        self._changed = threading.Condition()
        threading.Thread(target=self._copy, daemon=True).start()

    def _copy(self) -> None:
        while data := self._port.recv(_CHUNK):
            if not self._is_broken:
                try:
                    self._write(data)
                except OSError:  # nobody reads it any more; the command is to learn that too
                    self._is_broken = True
                    self._on_break()
            with self._changed:
                self._count += len(data)
                self._changed.notify()

    def wait(self, count: int) -> None:
        """Block until ``count`` bytes have been passed on."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_broken or self._count >= count)


class _Unpacker:
    """Unpacks a tar stream below a directory; starts with the first byte, if one comes."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, data: bytes) -> None:
        if self._process is None:
            assert self._directory is not None
            self._directory.mkdir(parents=True, exist_ok=True)
            # the owner inside is always root: files are to belong to whoever runs the lab
            command = ["tar", "-C", str(self._directory), "--no-same-owner", "-xf", "-"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def finish(self) -> None:
        if self._process is not None:
            self._process.communicate()


class Control:
    """Our end of the control port. ``send()`` may be called from any thread."""

    def __init__(self, port: socket.socket) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._received = b""

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send one message; that the lab is gone shows elsewhere."""
        with self._lock:
            try:
                self._port.sendall(kind + struct.pack("<I", len(payload)) + payload)
            except OSError:
                return

    def read_line(self, deadline: float) -> str:
        """Return the next line.

        Raises:
            OutOfTime: None came until ``deadline`` (on the monotonic clock).
            LostLab: The machine ended, or says that it cannot go on.
        """
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            # not settimeout(): that would hold for the other threads' sends as well
            if remaining <= 0 or not select.select([self._port], [], [], remaining)[0]:
                raise OutOfTime("no sign of it in time")
            data = self._port.recv(4096)
            if not data:
                raise LostLab("the machine ended")
            self._received += data
        raw, _, self._received = self._received.partition(b"\n")
        line = raw.decode(errors="replace")
        if line.startswith("fail "):
            raise LostLab(line.removeprefix("fail "))
        return line


class Session:
    """The host's side of one command in the lab. Main thread only, but for ``send()``."""

    def __init__(self, ports: dict[str, socket.socket], request: Request) -> None:
        self._request = request
        self._control, self._stdin = Control(ports["control"]), ports["stdin"]
        self._unpacker = _Unpacker(request.out)
        self._stdout = _Drain(ports["stdout"], partial(_write_all, 1), partial(self._control.send, b"P", b"\1"))
        self._stderr = _Drain(ports["stderr"], partial(_write_all, 2), partial(self._control.send, b"P", b"\2"))
        self._out = _Drain(ports["out"], self._unpacker.write, lambda: None)

    def wait_up(self, deadline: float) -> None:
        """Hand over the request and wait until the command is about to start."""
        self._control.send(b"S", self._request.encode())
        while self._control.read_line(deadline) != "up":
            pass  # "ready", of a machine that was not resumed
        threading.Thread(target=self._feed_stdin, daemon=True).start()
        if self._request.has_terminal:
            signal.signal(signal.SIGWINCH, lambda *_: self._send_window())
            self._send_window()

    def wait_exit(self, deadline: float) -> int:
        """Return the command's status, once all that it wrote has been passed on."""
        _, *numbers = self._control.read_line(deadline).split()
        status, stdout, stderr, out = map(int, numbers)
        self._stdout.wait(stdout)
        self._stderr.wait(stderr)
        self._out.wait(out)
        self._unpacker.finish()
        return status

    def kill(self) -> None:
        """End the command and all it started; its status still comes."""
        self._control.send(b"K")

    def _feed_stdin(self) -> None:
        count = 0
        try:
            while data := os.read(0, _CHUNK):
                self._stdin.sendall(data)
                count += len(data)
        except OSError:
            pass  # a closed stdin ends as an empty one does
        self._control.send(b"E", struct.pack("<Q", count))

    def _send_window(self) -> None:
        self._control.send(b"W", struct.pack("<HH", *_window_size()))


@contextmanager
def raw_terminal(is_wanted: bool) -> Iterator[None]:
    """Put the terminal on stdin into raw mode: keys such as Ctrl-C belong to the lab then."""
    if not is_wanted:
        yield
        return
    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def _window_size() -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))
    return rows, columns


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
