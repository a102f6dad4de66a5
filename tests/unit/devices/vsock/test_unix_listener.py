"""Host programs at the Unix socket, and the guest at theirs."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from kvmlite.devices.vsock.clock import Clock
from kvmlite.devices.vsock.mux import FIRST_HOST_PORT
from kvmlite.devices.vsock.unix_listener import MAX_GREETINGS, UnixListener
from kvmlite.errors import ConfigError, HostError

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "v.sock")


@pytest.fixture
def guest(make_guest, path):
    guest = make_guest(uds_path=path)
    guest.loop.run()
    yield guest
    guest.finish()
    assert not os.path.exists(path)


@pytest.fixture
def client(guest, path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.setblocking(False)
        yield client


def answer(guest, op, **fields):
    """Let the guest answer the request it got."""
    (request,) = guest.received()
    assert request.op == REQUEST
    guest.send(guest.packet_type(request.dst_port, request.src_port, op, **fields))


def ends(client):
    """Whether the device closed the client's stream; a reset if it had not read everything."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_connects_to_the_guest_and_talks(guest, client):
    client.send(b"CONNECT 52\n")
    guest.loop.run()
    answer(guest, RESPONSE)
    assert client.recv(100) == b"OK %d\n" % FIRST_HOST_PORT
    client.send(b"hello guest")
    guest.loop.run()
    assert [(p.dst_port, p.op, p.payload) for p in guest.received()] == [(52, RW, b"hello guest")]
    guest.send(guest.packet_type(52, FIRST_HOST_PORT, RW, b"hello host"))
    assert client.recv(100) == b"hello host"


def test_a_client_that_does_not_wait_for_ok_loses_nothing(guest, client):
    client.send(b"CONNECT 52\nfirst bytes")
    guest.loop.run()
    answer(guest, RESPONSE)
    assert [p.payload for p in guest.received()] == [b"first bytes"]


def test_a_connect_line_may_come_in_pieces(guest, client):
    for piece in (b"CON", b"NECT", b" 5", b"2", b"\nrest"):
        client.send(piece)
        guest.loop.run()
    answer(guest, RESPONSE)
    assert [p.payload for p in guest.received()] == [b"rest"]


def test_a_refused_client_reads_end_of_stream(guest, client):
    client.send(b"CONNECT 52\n")
    guest.loop.run()
    answer(guest, RST)
    assert client.recv(100) == b""


def test_a_client_the_guest_does_not_answer_reads_end_of_stream(guest, client):
    client.send(b"CONNECT 52\n")
    guest.loop.run()
    guest.device._mux.expire(float("inf"))
    assert client.recv(100) == b""


def test_a_client_that_leaves_before_the_answer_is_a_shutdown_for_the_guest(guest, client):
    client.send(b"CONNECT 52\n")
    guest.loop.run()
    client.close()
    answer(guest, RESPONSE)
    assert [(p.op, p.flags) for p in guest.received()] == [(SHUTDOWN, 3)]


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"CONNECT\n", b"CONNECT \n", b"CONNECT -1\n", b"connect 52\n", b"CONNECT 52 53\n", b"CONNECT 0x34\n",
        b"CONNECT 4294967295\n", b"CONNECT 4294967296\n", b"CONNECT 99999999999\n", b"GET / HTTP/1.1\r\n",
        b"CONNECT 5\xd9\xa2\n", b"\0" * 32, b"CONNECT " + b"5" * 24, b"x" * 5000,
    ],
)  # fmt: skip
def test_a_client_that_says_anything_else_is_closed(guest, client, line):
    client.send(line)
    guest.loop.run()
    assert ends(client)
    assert guest.received() == []


def test_a_line_ended_the_way_of_telnet_is_understood(guest, client):
    client.send(b"CONNECT 4294967294\r\n")
    guest.loop.run()
    assert [p.dst_port for p in guest.received()] == [4294967294]


def test_a_client_that_closes_in_the_middle_of_the_line_is_forgotten(guest, client):
    client.send(b"CONNECT 5")
    client.close()
    guest.loop.run()
    assert guest.received() == []


def test_a_client_that_says_nothing_is_closed_in_time(guest, client):
    client.send(b"CONNECT 5")
    guest.loop.run()
    listener = guest.device._host.unix_listener
    assert listener.expire(0.0)
    assert not listener.expire(float("inf"))
    assert client.recv(1) == b""


def test_silent_clients_keep_others_waiting_only_until_their_time_is_over(guest, path):
    silent = [socket.socket(socket.AF_UNIX) for _ in range(MAX_GREETINGS)]
    for client in silent:
        client.connect(path)
        guest.loop.run()
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(path)
        late.send(b"CONNECT 52\n")
        guest.loop.run()
        assert guest.received() == []
        guest.device._host.unix_listener.expire(float("inf"))
        guest.loop.run()
        assert [p.dst_port for p in guest.received()] == [52]
    for client in silent:
        assert client.recv(1) == b""
        client.close()


def test_clients_wait_for_the_driver_to_come_up(guest, path):
    guest.device.reset()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.send(b"CONNECT 52\n")
        guest.loop.run()
        guest.activate()
        guest.offer()
        assert [p.dst_port for p in guest.received()] == [52]


def test_reset_closes_clients_that_were_accepted(guest, client):
    client.send(b"CONNECT")
    guest.loop.run()
    guest.device.reset()
    assert client.recv(1) == b""


# ---- the guest's connections ----


def test_the_guest_reaches_the_socket_named_with_its_port(guest, path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}_1234")
        server.listen()
        guest.send(guest.packet_type(1000, 1234, REQUEST), guest.packet_type(1000, 1234, RW, b"hi"))
        assert [p.op for p in guest.received()] == [RESPONSE]
        host, _ = server.accept()
        with host:
            assert host.recv(10) == b"hi"


def test_the_guest_is_refused_where_nobody_listens(guest, path):
    guest.send(guest.packet_type(1000, 1234, REQUEST))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{path}_1235")
    guest.send(guest.packet_type(1000, 1235, REQUEST))
    with open(f"{path}_1236", "w"):
        pass
    guest.send(guest.packet_type(1000, 1236, REQUEST))
    assert [(p.op, p.src_port) for p in guest.received()] == [(RST, 1234), (RST, 1235), (RST, 1236)]


def test_the_guest_is_refused_when_the_backlog_is_full(guest, path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}_7")
        server.listen(0)
        guest.send(guest.packet_type(1, 7, REQUEST), guest.packet_type(2, 7, REQUEST))
        assert sorted((p.dst_port, p.op) for p in guest.received()) == [(1, RESPONSE), (2, RST)]


def test_a_listener_of_this_process_comes_before_a_socket_file(guest, path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}_5")
        server.listen()
        guest.send(guest.packet_type(1000, 5, REQUEST))
    assert len(guest.accepted) == 1


# ---- the file ----


def listen(loop, path):
    return UnixListener(path, loop, Clock(loop))


def test_a_live_socket_is_not_taken_over(guest, path):
    with pytest.raises(ConfigError, match=f"another process listens at {path}"):
        listen(guest.loop, path)
    assert stat.S_ISSOCK(os.stat(path).st_mode)


def test_a_live_socket_with_a_full_backlog_is_not_taken_over(guest, tmp_path):
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen(0)
        client.connect(path)
        with pytest.raises(ConfigError, match="another process"):
            listen(guest.loop, path)


def test_a_socket_file_that_a_dead_process_left_is_replaced(guest, tmp_path):
    path = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = listen(guest.loop, path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listener.close()
    assert not os.path.exists(path)


def test_another_kind_of_file_is_left_alone(guest, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        listen(guest.loop, str(path))
    assert path.read_text() == "mine"


def test_a_directory_that_does_not_exist_is_named(guest):
    with pytest.raises(HostError, match=r"cannot listen at /nonexistent/v\.sock: No such file"):
        listen(guest.loop, "/nonexistent/v.sock")


def test_a_file_that_replaced_ours_is_not_removed(guest, tmp_path):
    path = tmp_path / "v2.sock"
    listener = listen(guest.loop, str(path))
    path.unlink()
    path.write_text("somebody else's")
    listener.close()
    listener.close()
    assert path.read_text() == "somebody else's"


def test_a_file_that_is_gone_already_is_no_error_at_close(guest, tmp_path):
    path = tmp_path / "v3.sock"
    listener = listen(guest.loop, str(path))
    path.unlink()
    listener.close()
    assert not path.exists()


# ---- the clock ----


def test_the_clock_ticks_while_somebody_waits_and_then_stops(guest):
    ticks = []
    clock = Clock(guest.loop, tick_s=0.001)
    clock.add(lambda now: ticks.append(now) or len(ticks) < 3)
    while len(ticks) < 3:
        guest.loop.run_once()
    assert ticks == sorted(ticks)
    watched = guest.loop.watched
    clock.close()
    assert len(watched) == len(guest.loop.watched) + 1
    clock.close()
