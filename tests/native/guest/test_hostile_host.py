"""A host that breaks the protocol: the agent says so and ends, and never crashes."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from kvmlite.guest import protocol

from .conftest import AgentProcess, RawPeer


def exec_frame(number: int, *argv: bytes, flags: int = 0) -> bytes:
    return protocol.encode_exec(
        number,
        list(argv),
        {b"PATH": b"/usr/bin:/bin"},
        user=b"",
        cwd=b"",
        flags=flags,
        cells=(80, 24),
        windows=(1 << 20, 1 << 20),
    )


CAT = exec_frame(1, b"cat", flags=protocol.EXEC_STDIN)
BROKEN = {
    "message before HELLO": [protocol.encode(protocol.PING, 1)],
    "another version": [protocol.encode(protocol.HELLO, 0, b"KVLA\x02\0\0\0")],
    "another magic": [protocol.encode(protocol.HELLO, 0, b"KVLB\x01\0\0\0")],
    "HELLO too short": [protocol.encode(protocol.HELLO, 0, b"KVLA")],
    "payload too large": [b"\x01\x00\x01\x00\x01\0\0\0\0\0\0\0"],
    "reserved field": [b"\0\0\0\0\x01\0\x01\0\0\0\0\0"],
    "unknown type": [protocol.encode_hello(), protocol.encode(77, 1)],
    "message of the guest": [protocol.encode_hello(), protocol.encode(protocol.EXIT, 1, bytes(8))],
    "exec without id": [protocol.encode_hello(), exec_frame(0, b"true")],
    "id in use": [protocol.encode_hello(), CAT, CAT],
    "stdin beyond the window": [protocol.encode_hello(), CAT, *[protocol.encode(protocol.STDIN, 1, bytes(65536))] * 64],
    "stdin after its end": [
        protocol.encode_hello(),
        CAT,
        protocol.encode(protocol.STDIN, 1, bytes(10), protocol.FLAG_EOF),
        protocol.encode(protocol.STDIN, 1, b"x"),
    ],
    "window of another stream": [protocol.encode_hello(), CAT, protocol.encode_window(1, 7, 1)],
    "window too short": [protocol.encode_hello(), CAT, protocol.encode(protocol.WINDOW, 1, b"\1")],
    "credit overflow": [protocol.encode_hello(), CAT, protocol.encode_window(1, 1, 0xFFFFFFFF)],
    "signal too short": [protocol.encode_hello(), CAT, protocol.encode(protocol.SIGNAL, 1, b"\1")],
    "size too short": [protocol.encode_hello(), CAT, protocol.encode(protocol.WINSIZE, 1, b"\1")],
    "exec too long": [
        protocol.encode_hello(),
        *[protocol.encode(protocol.EXEC, 1, bytes(65536), protocol.FLAG_MORE)] * 17,
    ],
    "exec interrupted by another": [
        protocol.encode_hello(),
        protocol.encode(protocol.EXEC, 1, bytes(10), protocol.FLAG_MORE),
        exec_frame(2, b"true"),
    ],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_frame_ends_the_agent_with_a_reason(peer: RawPeer, agent_process: AgentProcess, name: str) -> None:
    try:
        for frame in BROKEN[name]:
            peer.send(frame)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it has ended before it was sent everything
    kinds = [kind for kind, *_ in peer.rest()]
    assert set(kinds) <= {protocol.STARTED, protocol.STDOUT, protocol.WINDOW, protocol.PONG, protocol.ERROR}
    assert agent_process.process.wait(30) == 0


def test_reason_is_told_to_the_host(peer: RawPeer) -> None:
    peer.send(protocol.encode(protocol.HELLO, 0, b"KVLA\x02\0\0\0"))
    assert peer.rest() == [(protocol.ERROR, 0, 0, b"host speaks protocol 2, this agent 1")]


MALFORMED_EXECS = [
    b"",
    bytes(23),
    bytes(24),
    bytes(25),  # no arguments
    bytes(16) + b"\x01\0\0\0\0\0\0\0" + b"\0\0",  # one argument announced, none there
    bytes(16) + b"\x01\0\0\0\0\0\0\0" + b"\0\0true",  # not terminated
    bytes(16) + b"\xff\xff\xff\xff\xff\xff\xff\xff" + b"\0\0true\0",
    bytes(16) + b"\x01\0\0\0\0\0\0\0" + b"\0\0true\0more\0",
]


@pytest.mark.parametrize("payload", MALFORMED_EXECS)
def test_malformed_exec_fails_alone(peer: RawPeer, payload: bytes) -> None:
    peer.send(protocol.encode_hello() + protocol.encode(protocol.EXEC, 5, payload) + protocol.encode(protocol.PING, 6))
    assert peer.next_frame() == (protocol.EXEC_FAILED, 0, 5, b"\x01\0\0\0\x4a\0\0\0")  # request, EBADMSG
    frame = peer.next_frame()
    assert frame is not None
    assert frame[:3] == (protocol.PONG, 0, 6)


def test_messages_for_a_command_that_has_ended_are_ignored(peer: RawPeer) -> None:
    late = protocol.encode_signal(9, 9) + protocol.encode_window(9, 1, 1) + protocol.encode(protocol.STDIN, 9, b"x")
    peer.send(protocol.encode_hello() + late + protocol.encode(protocol.PING, 6))
    frame = peer.next_frame()
    assert frame is not None
    assert frame[:3] == (protocol.PONG, 0, 6)


def test_flood_of_pings_without_reading_is_answered_in_the_end(peer: RawPeer) -> None:
    peer.send(protocol.encode_hello())
    count = 50_000
    sender = threading.Thread(target=peer.send, args=(protocol.encode(protocol.PING, 7) * count,))
    sender.start()
    sender.join(0.1)  # the agent's replies have nowhere to go by now, so it has stopped reading
    assert sender.is_alive()
    assert all(frame and frame[0] == protocol.PONG for frame in (peer.next_frame() for _ in range(count)))
    sender.join()


@pytest.mark.parametrize("payload", [b"", b"\x63\0\0\0", b"\0\0\0\0\0"])
def test_malformed_shutdown_is_refused(peer: RawPeer, payload: bytes) -> None:
    peer.send(protocol.encode_hello() + protocol.encode(protocol.SHUTDOWN, 3, payload))
    frame = peer.next_frame()
    assert frame is not None
    assert frame[0] == protocol.RESULT
    assert frame[3] != bytes(4)


@pytest.mark.parametrize("payload", [b"", bytes(4), bytes(8) + b"x", b"\0\0\0\0a\0b\0c\0\0"])
def test_malformed_mount_is_refused(peer: RawPeer, payload: bytes) -> None:
    peer.send(protocol.encode_hello() + protocol.encode(protocol.MOUNT, 3, payload))
    assert peer.next_frame() == (protocol.RESULT, 0, 3, b"\x4a\0\0\0")


@pytest.mark.parametrize("payload", [b"", b"/", b"a\0", b"/a", b"/a\0b\0"])
def test_malformed_root_is_refused(peer: RawPeer, payload: bytes) -> None:
    peer.send(protocol.encode_hello() + protocol.encode(protocol.ROOT, 3, payload))
    assert peer.next_frame() == (protocol.RESULT, 0, 3, b"\x4a\0\0\0")


@pytest.mark.parametrize("payload", [b"", b"/", b"a\x00", b"/a", b"/a\x00b\x00"])
def test_malformed_mkdir_is_refused(peer: RawPeer, payload: bytes) -> None:
    peer.send(protocol.encode_hello() + protocol.encode(protocol.MKDIR, 3, payload))
    assert peer.next_frame() == (protocol.RESULT, 0, 3, b"\x4a\0\0\0")


def test_mkdir_makes_what_is_missing(peer: RawPeer, tmp_path: Path) -> None:
    wanted = tmp_path / "one" / "two"
    peer.send(protocol.encode_hello())
    for number in (3, 4):
        peer.send(protocol.encode_mkdir(number, bytes(wanted)))
        assert peer.next_frame() == (protocol.RESULT, 0, number, bytes(4))
    assert wanted.is_dir()


def test_an_ordinary_process_does_not_change_its_root(peer: RawPeer) -> None:
    peer.send(protocol.encode_hello() + protocol.encode_root(3, b"/tmp"))
    assert peer.next_frame() == (protocol.RESULT, 0, 3, b"\x01\0\0\0")


def test_an_ordinary_process_does_not_configure_the_network(peer: RawPeer) -> None:
    peer.send(protocol.encode_hello() + protocol.encode(protocol.NETWORK, 3, bytes(12)))
    assert peer.next_frame() == (protocol.RESULT, 0, 3, b"\x01\0\0\0")


def test_sync_takes_no_payload(peer: RawPeer) -> None:
    peer.send(protocol.encode_hello() + protocol.encode(protocol.SYNC, 3, b"x"))
    assert peer.next_frame() == (protocol.RESULT, 0, 3, b"\x4a\0\0\0")


@pytest.mark.parametrize(
    ("serial", "error"),
    [(b"no-such-serial", 19), (b"", 22), (b"x" * 21, 22), (b"x:", 22), (b"x:1a", 22), (b":1", 22), (b"none:1", 19)],
)
def test_a_disk_with_an_unknown_serial_is_not_mounted(peer: RawPeer, serial: bytes, error: int) -> None:
    fields = [b"serial:" + serial, b"/nonexistent", b"ext4", b""]
    peer.send(protocol.encode_hello() + protocol.encode_mount(3, fields, 0))
    assert peer.next_frame() == (protocol.RESULT, 0, 3, bytes([error]) + bytes(3))


def test_random_bytes_never_crash_the_agent(peer: RawPeer, agent_process: AgentProcess) -> None:
    generator = random.Random(int(os.environ.get("KVMLITE_FUZZ_SEED", "1")))
    peer.send(protocol.encode_hello())
    try:
        for _ in range(3000):
            kind = generator.choice([2, 5, 8, 9, 10, 11, 13])
            payload = generator.randbytes(generator.randrange(0, 40))
            if kind == protocol.SIGNAL:
                payload = bytes(4)  # signal 0: nothing is killed, whatever the id
            peer.send(protocol.encode(kind, generator.randrange(0, 4), payload, generator.randrange(0, 2)))
    except (BrokenPipeError, ConnectionResetError):
        pass  # most frames are reason enough to end
    agent_process.stream.close()
    assert agent_process.process.wait(30) == 0
