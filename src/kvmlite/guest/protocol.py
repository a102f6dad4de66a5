"""Wire format between the host and the guest agent: bytes <-> messages, no I/O. Protocol version 1.

A frame is a header of 12 bytes, little-endian, and its payload::

    0 le32 size of the payload (at most 65536) / 4 u8 type / 5 u8 flags / 6 le16 zero / 8 le32 id

The id names a command or a request; the host chooses it, never 0 (HELLO and ERROR have 0), and may use it again
once the command or request has ended. H is the host, G the guest; integers are le32 unless said otherwise.

==  ===========  ====  =======================================================================================
 1  HELLO        G>H   "KVLA", le16 version, u8 channel, u8 is PID 1's, le64 start ns, le64 now ns, error count;
                       NUL-terminated: agent version, kernel release, "errno path" of each module that failed
 1  HELLO        H>G   "KVLA", le16 version, le16 zero
 2  EXEC         H>G   stdout window, stderr window, exec flags, le16 columns, le16 rows, argument count,
                       variable count; NUL-terminated: user, cwd, arguments, variables. Flag MORE: continued
 3  STARTED      G>H   pid, stdin window
 4  EXEC_FAILED  G>H   stage, errno; the id is free again
 5  STDIN        H>G   bytes; flag EOF: the last
 6  STDOUT       G>H   bytes; flag EOF: the last
 7  STDERR       G>H   bytes; flag EOF: the last
 8  WINDOW       both  stream, bytes the sender of the stream may send besides
 9  CLOSE        both  stream, zero: its receiver wants no more; the sender still ends it
10  SIGNAL       H>G   signal number, to the command's process group
11  WINSIZE      H>G   le16 columns, le16 rows
12  EXIT         G>H   kind (0 code, 1 signal), value; STDOUT and STDERR may follow until their EOF, which ends the id
13  PING         H>G
14  PONG         G>H   le64 CLOCK_MONOTONIC ns
15  CLOCK_SET    H>G   le64 ns since 1970; answered by RESULT
16  ENTROPY      H>G   1 to 512 random bytes; answered by RESULT
17  MOUNT        H>G   mount(2) flags; NUL-terminated: source ("serial:NAME": the disk with this serial;
                       "mmio:ADDRESS": the one with its registers there), target, type, data; answered by RESULT
18  SHUTDOWN     H>G   kind (0 power off, 1 reboot, 2 halt); answered by RESULT, then the machine ends
19  RESULT       G>H   errno, 0 if it worked
20  ERROR        G>H   text: the host broke the protocol; the channel ends
21  ROOT         H>G   NUL-terminated: a mount point that becomes the root directory; answered by RESULT
22  SYNC         H>G   answered by RESULT, when everything written has reached its disk
23  NETWORK      H>G   one interface: see guest/network.py; answered by RESULT
24  MKDIR        H>G   NUL-terminated: a directory, made with those above it; answered by RESULT
==  ===========  ====  =======================================================================================

The other side is not trusted: whatever does not fit this table raises :class:`ProtocolError` and nothing else.
"""

from __future__ import annotations

import struct

from kvmlite.errors import KvmliteError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

VERSION = 1
MAGIC = b"KVLA"
HEADER = struct.Struct("<IBBHI")
PAYLOAD_MAX = 65536
DATA_CHUNK = 61440
"""Stream data per frame: with its header it stays below 64 KiB, one vsock packet."""
EXEC_MAX = 1 << 20
STDIN_WINDOW = 256 * 1024
EXECS_MAX = 256
ENTROPY_MAX = 512

HELLO = 1
EXEC = 2
STARTED = 3
EXEC_FAILED = 4
STDIN = 5
STDOUT = 6
STDERR = 7
WINDOW = 8
CLOSE = 9
SIGNAL = 10
WINSIZE = 11
EXIT = 12
PING = 13
PONG = 14
CLOCK_SET = 15
ENTROPY = 16
MOUNT = 17
SHUTDOWN = 18
RESULT = 19
ERROR = 20
ROOT = 21
SYNC = 22
NETWORK = 23
MKDIR = 24

FLAG_EOF = 1
FLAG_MORE = 2

STREAM_STDIN = 0
STREAM_STDOUT = 1
STREAM_STDERR = 2

EXEC_TTY = 1
EXEC_STDIN = 2
EXEC_MERGE = 4

STAGE_REQUEST = 1
STAGE_SETUP = 2
STAGE_USER = 3
STAGE_CWD = 4
STAGE_EXEC = 5

EXIT_CODE = 0
EXIT_SIGNAL = 1

SHUTDOWN_KINDS = {"poweroff": 0, "reboot": 1, "halt": 2}
CHANNEL_NAMES = {1: "vsock", 2: "console", 3: "serial", 4: "fd"}

_HELLO = struct.Struct("<4sHBBQQI")
_HELLO_HOST = struct.Struct("<4sHH")
_EXEC = struct.Struct("<IIIHHII")
_TWO_WORDS = struct.Struct("<II")
_WORD = struct.Struct("<I")
_CELLS = struct.Struct("<HH")
_LONG = struct.Struct("<Q")
_IN_SIZE = 4 * (HEADER.size + PAYLOAD_MAX)


class ProtocolError(KvmliteError):
    """The agent sent what the protocol does not allow; the channel cannot be used any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleError:
    """A kernel module the agent could not load."""

    errno: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What the agent says of itself, first of all.

    Attributes:
        channel: What it speaks over: ``vsock``, ``console``, ``serial`` or, under test, ``fd``.
        is_system: It is PID 1's serving process, so SHUTDOWN ends the machine.
        start_ns: CLOCK_MONOTONIC when the agent was entered, nanoseconds since the kernel started counting.
        now_ns: The same clock when HELLO was written.
    """

    version: int
    channel: str
    is_system: bool
    start_ns: int
    now_ns: int
    agent_version: str
    kernel_release: str
    module_errors: tuple[ModuleError, ...]


class FrameReader:
    """Takes frames out of a byte stream, without copying payloads.

    Read into ``space()``, tell ``received(count)``, then go through ``frames()``. One thread at a time.
    """

    def __init__(self) -> None:
        self._view = memoryview(bytearray(_IN_SIZE))
        self._head = 0
        self._tail = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty. Payloads handed out before are overwritten."""
        if self._head:
            held = self._tail - self._head
            self._view[:held] = self._view[self._head : self._tail]
            self._head, self._tail = 0, held
        return self._view[self._tail :]

    def received(self, count: int) -> None:
        """``count`` bytes have been put at the start of ``space()``."""
        self._tail += count

    def frames(self) -> Iterator[tuple[int, int, int, memoryview]]:
        """Yield (type, flags, id, payload) of each whole frame; the payload is valid until ``space()``.

        Raises:
            ProtocolError: A header is impossible.
        """
        view, unpack = self._view, HEADER.unpack_from
        while self._tail - self._head >= HEADER.size:
            size, kind, flags, zero, number = unpack(view, self._head)
            if size > PAYLOAD_MAX or zero:
                raise ProtocolError(f"bad frame header: size {size}, type {kind}, reserved {zero:#x}")
            start = self._head + HEADER.size
            if start + size > self._tail:
                return
            self._head = start + size
            yield kind, flags, number, view[start : start + size]


def encode(kind: int, number: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """One frame of type ``kind`` with id ``number``."""
    return HEADER.pack(len(payload), kind, flags, 0, number) + payload


def encode_hello() -> bytes:
    """The host's HELLO."""
    return encode(HELLO, 0, _HELLO_HOST.pack(MAGIC, VERSION, 0))


def encode_exec(
    number: int,
    argv: Sequence[bytes],
    env: Mapping[bytes, bytes],
    *,
    user: bytes,
    cwd: bytes,
    flags: int,
    cells: tuple[int, int],
    windows: tuple[int, int],
) -> bytes:
    """EXEC, in as many frames as it takes.

    Args:
        flags: ``EXEC_TTY``, ``EXEC_STDIN``, ``EXEC_MERGE``.
        cells: Columns and rows of the terminal.
        windows: Bytes of stdout and of stderr the agent may send before it hears WINDOW.

    Raises:
        ValueError: Nothing to run, a NUL inside a string, or more than 1 MiB in all.
    """
    strings = [user, cwd, *argv, *(name + b"=" + value for name, value in env.items())]
    if not argv:
        raise ValueError("no command: argv is empty")
    if any(b"\0" in string for string in strings):
        raise ValueError("a NUL byte inside an argument, variable, user or directory")
    head = _EXEC.pack(*windows, flags, *cells, len(argv), len(env))
    payload = head + b"\0".join(strings) + b"\0"
    if len(payload) > EXEC_MAX:
        raise ValueError(f"command and environment of {len(payload)} bytes, at most {EXEC_MAX}")
    pieces = [payload[start : start + PAYLOAD_MAX] for start in range(0, len(payload), PAYLOAD_MAX)]
    last = len(pieces) - 1
    return b"".join(encode(EXEC, number, piece, FLAG_MORE if i < last else 0) for i, piece in enumerate(pieces))


def encode_window(number: int, stream: int, size: int) -> bytes:
    """WINDOW: ``size`` more bytes of ``stream`` are welcome."""
    return encode(WINDOW, number, _TWO_WORDS.pack(stream, size))


def encode_close(number: int, stream: int) -> bytes:
    """CLOSE: no more of ``stream``, please."""
    return encode(CLOSE, number, _TWO_WORDS.pack(stream, 0))


def encode_signal(number: int, signal: int) -> bytes:
    """SIGNAL to the command's process group."""
    return encode(SIGNAL, number, _WORD.pack(signal))


def encode_winsize(number: int, columns: int, rows: int) -> bytes:
    """WINSIZE of the command's terminal."""
    return encode(WINSIZE, number, _CELLS.pack(columns, rows))


def encode_clock_set(number: int, time_ns: int) -> bytes:
    """CLOCK_SET to ``time_ns`` nanoseconds since 1970."""
    return encode(CLOCK_SET, number, _LONG.pack(time_ns))


def encode_entropy(number: int, data: bytes) -> bytes:
    """ENTROPY: ``data``, at most 512 bytes, all of it unknown to anybody else."""
    if not 0 < len(data) <= ENTROPY_MAX:
        raise ValueError(f"{len(data)} bytes of entropy, 1 to {ENTROPY_MAX} allowed")
    return encode(ENTROPY, number, data)


def encode_mount(number: int, fields: Sequence[bytes], flags: int) -> bytes:
    """MOUNT; ``fields`` are source, target, type and data, ``flags`` those of mount(2)."""
    return encode(MOUNT, number, _WORD.pack(flags) + b"\0".join(fields) + b"\0")


def encode_root(number: int, directory: bytes) -> bytes:
    """ROOT; ``directory`` is absolute."""
    return encode(ROOT, number, directory + b"\x00")


def encode_mkdir(number: int, directory: bytes) -> bytes:
    """MKDIR; ``directory`` is absolute."""
    return encode(MKDIR, number, directory + b"\x00")


def encode_shutdown(number: int, kind: int) -> bytes:
    """SHUTDOWN; ``kind`` is one of ``SHUTDOWN_KINDS``."""
    return encode(SHUTDOWN, number, _WORD.pack(kind))


def decode_hello(payload: memoryview) -> Hello:
    """Take the agent's HELLO apart.

    Raises:
        ProtocolError: It is malformed, or of another version.
    """
    if len(payload) < _HELLO.size:
        raise ProtocolError(f"HELLO of {len(payload)} bytes")
    magic, version, channel, is_system, start_ns, now_ns, count = _HELLO.unpack_from(payload)
    if magic != MAGIC:
        raise ProtocolError(f"HELLO begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(
            f"the agent speaks protocol {version}, this kvmlite {VERSION}", hint="rebuild the initramfs with this agent"
        )
    strings = bytes(payload[_HELLO.size :]).decode(errors="replace").split("\0")
    if strings.pop() or len(strings) != 2 + count or channel not in CHANNEL_NAMES:
        raise ProtocolError(f"HELLO with {len(strings)} strings, {2 + count} announced, channel {channel}")
    return Hello(
        version=version,
        channel=CHANNEL_NAMES[channel],
        is_system=bool(is_system),
        start_ns=start_ns,
        now_ns=now_ns,
        agent_version=strings[0],
        kernel_release=strings[1],
        module_errors=tuple(_decode_module_error(text) for text in strings[2:]),
    )


def _decode_module_error(text: str) -> ModuleError:
    number, _, path = text.partition(" ")
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise ProtocolError(f"HELLO: module error {text!r}")
    return ModuleError(errno=int(number), path=path)


def decode_words(kind: int, payload: memoryview) -> tuple[int, int]:
    """The two words of STARTED, EXEC_FAILED, WINDOW, CLOSE or EXIT.

    Raises:
        ProtocolError: The payload has another size.
    """
    if len(payload) != _TWO_WORDS.size:
        raise ProtocolError(f"message {kind} of {len(payload)} bytes, {_TWO_WORDS.size} expected")
    first, second = _TWO_WORDS.unpack(payload)
    return first, second


def decode_exit(payload: memoryview) -> tuple[int, int]:
    """EXIT as (exit code, signal); the code is 128 + signal, as in a shell, if a signal ended the command.

    Raises:
        ProtocolError: Neither a code below 256 nor a signal below 128.
    """
    kind, value = decode_words(EXIT, payload)
    if kind == EXIT_CODE and value < 256:
        return value, 0
    if kind == EXIT_SIGNAL and 0 < value < 128:
        return 128 + value, value
    raise ProtocolError(f"EXIT of kind {kind}, value {value}")


def decode_result(payload: memoryview) -> int:
    """RESULT: an errno, 0 if it worked."""
    if len(payload) != _WORD.size:
        raise ProtocolError(f"RESULT of {len(payload)} bytes")
    error: int = _WORD.unpack(payload)[0]
    if error > 4095:
        raise ProtocolError(f"RESULT with errno {error}")
    return error


def decode_pong(payload: memoryview) -> int:
    """PONG: the guest's CLOCK_MONOTONIC, ns."""
    if len(payload) != _LONG.size:
        raise ProtocolError(f"PONG of {len(payload)} bytes")
    now_ns: int = _LONG.unpack(payload)[0]
    return now_ns


def decode_text(payload: memoryview) -> str:
    """ERROR's text, made printable; at most 300 characters."""
    text = bytes(payload[:300]).decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)
