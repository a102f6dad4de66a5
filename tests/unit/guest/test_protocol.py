"""Frames and messages, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlite.guest import protocol
from kvmlite.guest.protocol import FrameReader, ProtocolError

HELLO = (
    b"KVLA\x01\x00\x01\x01"  # magic, version 1, vsock, PID 1's
    b"\x10\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00\x00\x00\x00\x00"  # start 16 ns, now 32 ns
)


def read_frames(data: bytes, chunk: int = 1 << 20) -> list[tuple[int, int, int, bytes]]:
    reader = FrameReader()
    frames = []
    while data:
        space = reader.space()
        piece = data[: min(chunk, len(space))]
        space[: len(piece)] = piece
        reader.received(len(piece))
        data = data[len(piece) :]
        frames += [(kind, flags, number, bytes(payload)) for kind, flags, number, payload in reader.frames()]
    return frames


def test_frame_header_is_size_type_flags_zero_id() -> None:
    frame = protocol.encode(protocol.STDIN, 0x01020304, b"ab", protocol.FLAG_EOF)
    assert frame == b"\x02\x00\x00\x00\x05\x01\x00\x00\x04\x03\x02\x01ab"


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (protocol.encode_hello(), b"\x08\0\0\0\x01\0\0\0\0\0\0\0KVLA\x01\0\0\0"),
        (protocol.encode_window(7, 1, 0x40000), b"\x08\0\0\0\x08\0\0\0\x07\0\0\0\x01\0\0\0\0\0\x04\0"),
        (protocol.encode_close(7, 2), b"\x08\0\0\0\x09\0\0\0\x07\0\0\0\x02\0\0\0\0\0\0\0"),
        (protocol.encode_signal(7, 15), b"\x04\0\0\0\x0a\0\0\0\x07\0\0\0\x0f\0\0\0"),
        (protocol.encode_winsize(7, 80, 24), b"\x04\0\0\0\x0b\0\0\0\x07\0\0\0\x50\0\x18\0"),
        (protocol.encode_clock_set(7, 1), b"\x08\0\0\0\x0f\0\0\0\x07\0\0\0\x01\0\0\0\0\0\0\0"),
        (protocol.encode_entropy(7, b"xy"), b"\x02\0\0\0\x10\0\0\0\x07\0\0\0xy"),
        (
            protocol.encode_mount(7, [b"a", b"/b", b"c", b""], 1),
            b"\x0c\0\0\0\x11\0\0\0\x07\0\0\0\x01\0\0\0a\0/b\0c\0\0",
        ),
        (protocol.encode_root(7, b"/mnt"), b"\x05\0\0\0\x15\0\0\0\x07\0\0\0/mnt\0"),
        (protocol.encode_shutdown(7, 1), b"\x04\0\0\0\x12\0\0\0\x07\0\0\0\x01\0\0\0"),
    ],
)
def test_messages_of_the_host_have_these_bytes(frame: bytes, expected: bytes) -> None:
    assert frame == expected


def test_exec_is_windows_flags_cells_counts_and_strings() -> None:
    frame = protocol.encode_exec(
        3, [b"ls", b"-l"], {b"A": b"b"}, user=b"me", cwd=b"/", flags=5, cells=(80, 24), windows=(1, 2)
    )
    head = b"\x01\0\0\0\x02\0\0\0\x05\0\0\0\x50\0\x18\0\x02\0\0\0\x01\0\0\0"
    strings = b"me\0/\0ls\0-l\0A=b\0"
    assert frame == b"\x27\0\0\0\x02\0\0\0\x03\0\0\0" + head + strings


def test_long_exec_is_continued_in_further_frames() -> None:
    frames = read_frames(
        protocol.encode_exec(3, [b"sh", b"x" * 100_000], {}, user=b"", cwd=b"", flags=0, cells=(0, 0), windows=(1, 1))
    )
    assert [(kind, flags, len(payload)) for kind, flags, _, payload in frames] == [
        (protocol.EXEC, protocol.FLAG_MORE, 65536),
        (protocol.EXEC, 0, 24 + 2 + 3 + 100_001 - 65536),
    ]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "no command"),
        ([b"a\0b"], "NUL"),
        ([b"sh", b"x" * (1 << 20)], "at most 1048576"),
    ],
)
def test_exec_that_cannot_be_sent_is_refused(argv: list[bytes], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        protocol.encode_exec(1, argv, {}, user=b"", cwd=b"", flags=0, cells=(0, 0), windows=(1, 1))


@pytest.mark.parametrize("size", [0, 513])
def test_entropy_is_1_to_512_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 512 allowed"):
        protocol.encode_entropy(1, bytes(size))


@pytest.mark.parametrize("chunk", [1, 7, 13, 1 << 20])
def test_frames_come_out_whole_however_the_bytes_arrive(chunk: int) -> None:
    stream = protocol.encode(6, 1, b"abc") + protocol.encode(7, 2) + protocol.encode(6, 1, bytes(70), 1)
    assert read_frames(stream, chunk) == [(6, 0, 1, b"abc"), (7, 0, 2, b""), (6, 1, 1, bytes(70))]


def test_largest_payload_passes() -> None:
    assert read_frames(protocol.encode(6, 1, bytes(65536))) == [(6, 0, 1, bytes(65536))]


@pytest.mark.parametrize(
    "header",
    [
        b"\x01\x00\x01\x00\x06\x00\x00\x00\x01\x00\x00\x00",  # 65537 bytes of payload
        b"\xff\xff\xff\xff\x06\x00\x00\x00\x01\x00\x00\x00",
        b"\x00\x00\x00\x00\x06\x00\x01\x00\x01\x00\x00\x00",  # the reserved field
    ],
)
def test_impossible_header_is_a_protocol_error(header: bytes) -> None:
    with pytest.raises(ProtocolError, match="bad frame header"):
        read_frames(header)


def test_hello_says_who_the_agent_is() -> None:
    payload = HELLO + b"\x02\0\0\x000.1.0\x006.1.0-9-cloud\x002 /m/a.ko\x008 /m/b c.ko\0"
    hello = protocol.decode_hello(memoryview(payload))
    assert (hello.channel, hello.is_system, hello.start_ns, hello.now_ns) == ("vsock", True, 16, 32)
    assert (hello.agent_version, hello.kernel_release) == ("0.1.0", "6.1.0-9-cloud")
    assert [(error.errno, error.path) for error in hello.module_errors] == [(2, "/m/a.ko"), (8, "/m/b c.ko")]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        HELLO,
        b"X" + HELLO[1:] + b"\0\0\0\0a\0b\0",
        HELLO[:4] + b"\x02" + HELLO[5:] + b"\0\0\0\0a\0b\0",  # version 2
        HELLO[:6] + b"\x09" + HELLO[7:] + b"\0\0\0\0a\0b\0",  # channel 9
        HELLO + b"\0\0\0\0a\0b",  # not terminated
        HELLO + b"\0\0\0\0a\0",  # one string
        HELLO + b"\x01\0\0\0a\0b\0",  # an error announced, none there
        HELLO + b"\x01\0\0\0a\0b\0x /m\0",  # no number
        HELLO + b"\x01\0\0\0a\0b\x009999999999 /m\0",
        HELLO + b"\xff\xff\xff\xffa\0b\0",
    ],
)
def test_malformed_hello_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_hello(memoryview(payload))


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"\0\0\0\0\0\0\0\0", (0, 0)),
        (b"\0\0\0\0\xff\0\0\0", (255, 0)),
        (b"\x01\0\0\0\x09\0\0\0", (137, 9)),
    ],
)
def test_exit_is_code_or_128_plus_signal(payload: bytes, expected: tuple[int, int]) -> None:
    assert protocol.decode_exit(memoryview(payload)) == expected


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0\0\0\0\0\0\0",
        b"\0\0\0\0\0\x01\0\0",  # code 256
        b"\x01\0\0\0\0\0\0\0",  # signal 0
        b"\x01\0\0\0\x80\0\0\0",  # signal 128
        b"\x02\0\0\0\0\0\0\0",  # kind 2
    ],
)
def test_malformed_exit_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_exit(memoryview(payload))


@pytest.mark.parametrize("payload", [b"", b"\0\0\0", b"\0\x10\0\0", b"\0\0\0\0\0"])
def test_malformed_result_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_result(memoryview(payload))


def test_text_of_the_agent_is_made_printable() -> None:
    assert protocol.decode_text(memoryview(b"a\x1b[31m\nb\xff")) == "a?[31m?b\ufffd"
    assert len(protocol.decode_text(memoryview(b"x" * 5000))) == 300


DECODERS = [
    protocol.decode_hello,
    protocol.decode_exit,
    protocol.decode_result,
    protocol.decode_pong,
    protocol.decode_text,
    lambda payload: protocol.decode_words(protocol.WINDOW, payload),
]


@given(st.binary(max_size=200), st.integers(min_value=1, max_value=50))
def test_any_bytes_give_frames_or_a_protocol_error(data: bytes, chunk: int) -> None:
    try:
        frames = read_frames(data, chunk)
    except ProtocolError:
        return
    assert (
        b"".join(protocol.encode(k, n, p, f) for k, f, n, p in frames) == data[: sum(12 + len(p) for *_, p in frames)]
    )


@given(st.sampled_from(DECODERS), st.one_of(st.binary(max_size=80), st.binary(max_size=60).map(lambda b: HELLO + b)))
def test_any_payload_decodes_or_is_a_protocol_error(decoder: object, payload: bytes) -> None:
    assert callable(decoder)
    try:
        decoder(memoryview(payload))
    except ProtocolError:
        return
