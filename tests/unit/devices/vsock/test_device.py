"""The socket device as its guest and its host see it."""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
import threading
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shortage import of_descriptors

from kvmlite.devices.vsock import Vsock
from kvmlite.devices.vsock.mux import FIRST_HOST_PORT, MAX_CONNECTIONS
from kvmlite.devices.vsock.rx import RESET_LIMIT
from kvmlite.errors import ConfigError, HostError, StateError
from kvmlite.host.loop import DeviceLoop
from kvmlite.testing import VirtioRig, check_virtio_device

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
BOTH = 3


@pytest.fixture
def make(guest):
    """The packet type, by keyword; from the guest's port 1000 to the host's port 5 unless told otherwise."""
    packet = guest.packet_type
    return lambda op, payload=b"", src_port=1000, dst_port=5, **fields: packet(
        src_port, dst_port, op, payload, **fields
    )


@pytest.fixture
def stream(guest, make):
    """An open connection: the host's end as a socket."""
    guest.send(make(REQUEST))
    assert [p.op for p in guest.received()] == [RESPONSE]
    with socket.socket(fileno=guest.accepted.pop()) as host:
        host.setblocking(False)
        yield host


def ops(packets):
    return [(packet.op, packet.flags) for packet in packets]


def run_in_thread(guest, function, between=lambda: None):
    """Run a blocking call in a thread and the loop here; return its result or the exception it raised."""
    results = []

    def run():
        try:
            results.append(function())
        except HostError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        guest.loop.run()
        between()
        thread.join(0.001)
    return results[0]


# ---- as every virtio device ----


@pytest.mark.parametrize("uds", [False, True])
def test_it_keeps_the_rules_of_every_virtio_device(tmp_path, uds):
    check_virtio_device(Vsock(uds_path=str(tmp_path / "v.sock") if uds else None).attach)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_it_works_behind_a_transport_with_all_ring_features(make, event_idx, indirect):
    accepted = []
    with VirtioRig(Vsock(cid=3).attach, event_idx=event_idx, indirect=indirect) as rig:
        rig.device.listen(5, accepted.append)
        rig.start()
        for _ in range(4):
            rig.queues[0].add_chain(writable=[44, 100])
        rig.kick(0)
        rig.take_irq()
        rig.queues[1].add_chain(readable=[make(REQUEST).pack()])
        rig.queues[1].add_chain(readable=[make(RW, b"up").pack()])
        rig.kick(1)
        with socket.socket(fileno=accepted[0]) as host:
            host.send(b"down")
            rig.loop.run()
            assert host.recv(10) == b"up"
        rig.loop.run()
        assert rig.take_irq() > 0
        received = [entry.data for entry in rig.queues[0].take_all_used()]
        assert [(data[30], data[44:]) for data in received] == [(RESPONSE, b""), (RW, b"down"), (SHUTDOWN, b"")]
        assert rig.errors == []


# ---- configuration ----


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 8, "0300000000000000"),
        (0, 4, "03000000"),
        (4, 4, "00000000"),
        (0, 1, "03"),
        (6, 4, "00000000"),
        (100, 2, "0000"),
    ],
)
def test_config_space_is_the_guest_cid_and_then_zeros(guest, offset, size, expected):
    assert guest.device.read_config(offset, size) == bytes.fromhex(expected)
    guest.device.write_config(0, b"\xff" * 8)
    assert guest.device.read_config(offset, size) == bytes.fromhex(expected)


def test_it_is_device_19_with_three_queues_and_offers_no_seqpacket(guest):
    assert guest.device.device_id == 19
    assert len(guest.device.queue_sizes) == 3
    assert guest.device.device_features == 0


# ---- opening ----


def test_a_listener_gets_the_guests_connection(guest, make):
    guest.send(make(REQUEST, buf_alloc=4096))
    (answer,) = guest.received()
    assert (answer.src_cid, answer.dst_cid, answer.src_port, answer.dst_port) == (2, 3, 5, 1000)
    assert (answer.op, answer.type, answer.buf_alloc, answer.fwd_cnt) == (RESPONSE, 1, 262144, 0)
    (fd,) = guest.accepted
    assert os.get_inheritable(fd) is False
    assert os.get_blocking(fd)


def test_a_connection_to_a_port_nobody_listens_at_is_reset(guest, make):
    guest.send(make(REQUEST, dst_port=6))
    assert [(p.op, p.src_port, p.dst_port) for p in guest.received()] == [(RST, 6, 1000)]


def test_a_port_has_one_listener(guest):
    with pytest.raises(ConfigError, match="port 5 has a listener already"):
        guest.device.listen(5, lambda fd: None)


def test_asking_twice_for_the_same_connection_resets_it(guest, make, stream):
    guest.send(make(REQUEST))
    assert ops(guest.received()) == [(RST, 0)]
    assert stream.recv(1) == b""


def connect_from_host(guest, make, answer):
    """Let the host connect to guest port 52 and the guest answer with ``answer``; what ``connect`` made of it."""

    def reply():
        for packet in guest.received():
            if packet.op == REQUEST:
                assert (packet.dst_port, packet.buf_alloc) == (52, 262144)
                guest.send(make(answer, src_port=52, dst_port=packet.src_port))

    original = guest.raise_queue
    guest.raise_queue = lambda: (original(), guest.loop.post(reply))
    result = run_in_thread(guest, partial(guest.device.connect, 52))
    guest.loop.run()
    guest.raise_queue = original
    return result


def test_the_host_connects_and_bytes_flow_both_ways(guest, make):
    fd = connect_from_host(guest, make, RESPONSE)
    with socket.socket(fileno=fd) as host:
        guest.send(make(RW, b"ping", src_port=52, dst_port=FIRST_HOST_PORT))
        assert host.recv(10) == b"ping"
        assert host.getblocking()
        host.send(b"pong")
        guest.loop.run()
        assert [(p.op, p.payload) for p in guest.received()] == [(RW, b"pong")]


def test_a_guest_that_refuses_is_a_refused_connection(guest, make):
    error = connect_from_host(guest, make, RST)
    assert isinstance(error, HostError)
    assert error.errno == errno.ECONNREFUSED
    assert "guest port 52: connection refused" in str(error)
    assert guest.device.statistics().connections == 0


def test_a_guest_that_answers_nonsense_is_a_refused_connection(guest, make):
    assert connect_from_host(guest, make, RW).errno == errno.ECONNREFUSED


def test_a_guest_that_does_not_answer_is_a_timeout_and_is_told(guest):
    for timeout_s in (0.01, 0.3, 10.0):  # a busy host may be over the first before the guest has seen anything
        error = run_in_thread(guest, partial(guest.device.connect, 52, timeout_s=timeout_s))
        guest.loop.run()
        assert error.errno == errno.ETIMEDOUT
        if seen := [p.op for p in guest.received()]:
            break
    assert seen == [REQUEST, RST]
    assert guest.device.statistics().connections == 0


def test_a_request_the_guest_never_saw_leaves_no_trace(guest):
    guest.take_rx_buffers()
    error = run_in_thread(guest, partial(guest.device.connect, 52, timeout_s=0.01))
    assert error.errno == errno.ETIMEDOUT
    guest.loop.run()
    guest.offer()
    assert guest.received() == []


def test_the_device_gives_up_a_request_after_its_time(guest):
    deadlines = iter([0.0] * 3)

    def expire():
        if next(deadlines, None) is None and guest.device._mux is not None:
            guest.device._mux.expire(float("inf"))

    error = run_in_thread(guest, partial(guest.device.connect, 52), between=expire)
    assert error.errno == errno.ECONNREFUSED
    assert [p.op for p in guest.received()] == [REQUEST, RST]


def test_connecting_before_the_driver_is_up_is_refused(guest):
    guest.device.reset()
    error = run_in_thread(guest, partial(guest.device.connect, 52))
    assert error.errno == errno.ECONNREFUSED
    assert "not up yet" in error.hint


# ---- data ----


@pytest.mark.parametrize("cuts", [(), (1,), (43,), (44,), (45,), (10, 20, 44, 46), tuple(range(1, 60))])
def test_a_packet_may_be_cut_into_descriptors_anywhere(guest, make, stream, cuts):
    guest.send(make(RW, b"twelve bytes"), cuts=cuts)
    assert stream.recv(100) == b"twelve bytes"


def test_bytes_after_the_stated_length_are_not_data(guest, make, stream):
    guest.send(make(RW, b"yes").pack() + b"no")
    assert stream.recv(100) == b"yes"


def test_an_empty_data_packet_is_nothing(guest, make, stream):
    guest.send(make(RW, b""))
    with pytest.raises(BlockingIOError):
        stream.recv(1)
    assert guest.received() == []


@pytest.mark.parametrize("sizes", [(44, 10), (45,), (54,), (1, 42, 5, 6), (44, 1, 1, 1, 7)])
def test_rx_buffers_may_have_any_shape(guest, make, stream, sizes):
    guest.take_rx_buffers()
    stream.send(b"0123456789" * 2)
    guest.offer(20, *sizes)
    packets = guest.received()
    assert b"".join(p.payload for p in packets) == b"0123456789" * 2
    assert {len(p.payload) for p in packets} == {sum(sizes) - 44}


def test_an_rx_buffer_without_room_for_a_byte_is_returned_unused(guest, make, stream):
    guest.take_rx_buffers()
    guest.offer(3, 44)
    stream.send(b"x")
    guest.loop.run()
    assert [entry.written for entry in guest.rx.used] == [0, 0, 0]
    assert guest.device.statistics().malformed == 3


def test_host_bytes_stop_when_the_guests_buffer_is_full(guest, make, stream):
    guest.send(make(CREDIT_UPDATE, buf_alloc=10))
    stream.send(b"0123456789ABCDEF")
    guest.loop.run()
    packets = guest.received()
    assert [(p.op, p.payload) for p in packets] == [(RW, b"0123456789"), (CREDIT_REQUEST, b"")]
    assert not guest.loop.is_reading(guest.device_fd())
    guest.send(make(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=4))
    assert [(p.op, p.payload) for p in guest.received()] == [(RW, b"ABCD"), (CREDIT_REQUEST, b"")]
    guest.send(make(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=14))
    assert [(p.op, p.payload) for p in guest.received()] == [(RW, b"EF")]
    assert guest.device.statistics().credit_stalls == 2


def test_without_rx_buffers_the_host_socket_leaves_the_poll_set_until_the_driver_adds_some(guest, make, stream):
    guest.take_rx_buffers()
    stream.send(b"late")
    guest.loop.run()
    assert not guest.loop.is_reading(guest.device_fd())
    guest.offer(1)
    assert [p.payload for p in guest.received()] == [b"late"]
    guest.offer(1)
    assert guest.loop.is_reading(guest.device_fd())


def test_a_host_that_does_not_read_costs_one_buffer_and_the_guest_runs_out_of_credit(guest, make, stream):
    sent = 0
    chunk = bytes(range(256)) * 16
    fwd_cnt = 0
    while sent - fwd_cnt < 262144:
        guest.send(make(RW, chunk))
        sent += len(chunk)
        for packet in guest.received():
            fwd_cnt = packet.fwd_cnt
    assert guest.device.statistics().unsent_bytes <= 262144
    guest.send(make(CREDIT_REQUEST))
    fwd_cnt = guest.received()[-1].fwd_cnt
    assert sent - fwd_cnt == guest.device.statistics().unsent_bytes
    while sent - fwd_cnt < 262144:
        guest.send(make(RW, chunk[: 262144 - (sent - fwd_cnt)]))
        sent = min(sent + len(chunk), fwd_cnt + 262144)
    assert guest.device.statistics().unsent_bytes == 262144
    received = bytearray()
    while len(received) < sent:
        received += stream.recv(1 << 20)
        guest.loop.run()
    assert received == (chunk * (sent // len(chunk) + 1))[:sent]
    assert guest.device.statistics().unsent_bytes == 0
    assert guest.received()[-1].fwd_cnt > sent - 262144 // 4


def test_a_guest_that_sends_beyond_its_credit_is_reset(guest, make, stream):
    guest.send(*[make(RW, bytes(65536))] * 40)
    assert (RST, 0) in ops(guest.received())
    assert guest.device.statistics().unsent_bytes == 0


@pytest.mark.parametrize("shape", [(44, 100), (300,), (44, 4096)], ids=str)
def test_eight_mebibytes_arrive_intact_in_both_directions(guest, make, stream, shape):
    down, up = random.Random(1).randbytes(8 << 20), random.Random(2).randbytes(8 << 20)
    if shape != (44, 4096):
        down, up = down[: 1 << 20], up[: 1 << 20]
    guest.take_rx_buffers()
    got_down, got_up = bytearray(), bytearray()
    sent_down = sent_up = fwd_cnt = 0
    while len(got_down) < len(down) or len(got_up) < len(up):
        try:
            sent_down += stream.send(down[sent_down : sent_down + 100_000])
            got_up += stream.recv(70_000)
        except BlockingIOError:
            pass
        for packet in guest.received():
            assert packet.op in (RW, CREDIT_UPDATE, CREDIT_REQUEST)
            got_down += packet.payload
            fwd_cnt = packet.fwd_cnt
        step = min(30_000, 262144 - (sent_up - fwd_cnt), len(up) - sent_up)
        guest.send(make(RW, up[sent_up : sent_up + step], fwd_cnt=len(got_down)))
        sent_up += step
        guest.offer(60, *shape)
    assert got_down == down
    assert got_up == up


def test_hosts_take_turns_however_few_buffers_there_are(guest, make):
    guest.send(*[make(REQUEST, src_port=port, buf_alloc=1 << 20) for port in (1, 2, 3, 4)])
    guest.received()
    guest.take_rx_buffers()
    for fd in guest.accepted:
        os.set_blocking(fd, False)
        os.write(fd, bytes(100_000))
    guest.loop.run()
    for _ in range(8):
        guest.offer(5, 44, 4096)
    share = dict.fromkeys((1, 2, 3, 4), 0)
    for packet in guest.received():
        share[packet.dst_port] += len(packet.payload)
    assert share == {1: 40960, 2: 40960, 3: 40960, 4: 40960}


def test_a_batch_of_packets_raises_one_interrupt(guest, make, stream):
    before = guest.interrupts
    guest.send(*[make(CREDIT_REQUEST), *[make(RW, b"x")] * 50])
    assert guest.interrupts == before + 1
    stream.send(bytes(100_000))
    guest.loop.run()
    assert len(guest.received()) > 10
    assert guest.interrupts <= before + 3


# ---- closing ----


def test_the_guests_end_of_stream_reaches_the_host_and_the_other_direction_stays_open(guest, make, stream):
    guest.send(make(RW, b"last"), make(SHUTDOWN, flags=2))
    assert stream.recv(10) == b"last"
    assert stream.recv(10) == b""
    stream.send(b"reply")
    guest.loop.run()
    assert [(p.op, p.payload) for p in guest.received()] == [(RW, b"reply")]


def test_the_hosts_end_of_stream_reaches_the_guest_and_the_other_direction_stays_open(guest, make, stream):
    stream.send(b"last")
    stream.shutdown(socket.SHUT_WR)
    guest.loop.run()
    assert [(p.op, p.flags, p.payload) for p in guest.received()] == [(RW, 0, b"last"), (SHUTDOWN, 2, b"")]
    guest.send(make(RW, b"reply"))
    assert stream.recv(10) == b"reply"


def test_a_guest_that_reads_no_more_makes_the_hosts_writes_fail(guest, make, stream):
    guest.send(make(SHUTDOWN, flags=1))
    with pytest.raises(BrokenPipeError):
        stream.send(b"x")
    guest.send(make(RW, b"still talking"))
    assert stream.recv(100) == b"still talking"


def test_a_clean_disconnect_of_the_guest_is_completed_with_a_reset(guest, make, stream):
    guest.send(make(RW, b"bye"), make(SHUTDOWN, flags=BOTH))
    assert ops(guest.received()) == [(RST, 0)]
    assert stream.recv(10) == b"bye"
    assert stream.recv(10) == b""
    assert guest.device.statistics().connections == 0


def test_a_disconnect_in_two_steps_is_completed_too(guest, make, stream):
    guest.send(make(SHUTDOWN, flags=1))
    assert guest.received() == []
    guest.send(make(SHUTDOWN, flags=2))
    assert ops(guest.received()) == [(RST, 0)]


def test_bytes_of_a_guest_that_disconnected_still_reach_a_slow_host(guest, make, stream):
    data = random.Random(3).randbytes(700_000)
    sent = 0
    while guest.device.statistics().unsent_bytes < 100_000:
        guest.send(make(RW, data[sent : sent + 50_000]))
        sent += 50_000
    guest.send(make(SHUTDOWN, flags=BOTH), make(RST))
    assert (RST, 0) in ops(guest.received())
    assert guest.device.statistics().connections == 1
    received = bytearray()
    while chunk := stream.recv(1 << 20):
        received += chunk
        guest.loop.run()
    assert received == data[:sent]
    assert guest.device.statistics().connections == 0


def test_a_host_that_closes_is_a_shutdown_of_both_directions_and_the_guests_reset_ends_it(guest, make, stream):
    stream.close()
    guest.loop.run()
    assert ops(guest.received()) == [(SHUTDOWN, BOTH)]
    guest.send(make(RW, b"into the void"))
    assert guest.received() == []
    guest.send(make(RST))
    assert guest.received() == []
    assert guest.device.statistics().connections == 0


def test_a_host_that_closes_with_unread_bytes_is_a_shutdown_as_well(guest, make, stream):
    guest.send(make(RW, b"never read"))
    stream.close()
    guest.loop.run()
    assert ops(guest.received()) == [(SHUTDOWN, BOTH)]


def test_a_guest_that_never_resets_a_finished_connection_is_reset(guest, make, stream):
    stream.close()
    guest.loop.run()
    guest.received()
    assert guest.device._mux.expire(0.0)
    assert guest.received() == []
    assert not guest.device._mux.expire(float("inf"))
    assert ops(guest.received()) == [(RST, 0)]
    assert guest.device.statistics().connections == 0


def test_a_host_that_half_closed_and_then_left_is_noticed_when_the_guest_sends(guest, make, stream):
    stream.shutdown(socket.SHUT_WR)
    guest.loop.run()
    stream.close()
    guest.received()
    guest.send(make(RW, b"x"))
    assert ops(guest.received()) == [(SHUTDOWN, BOTH)]


def test_a_reset_of_the_guest_is_not_answered_and_ends_the_hosts_stream(guest, make, stream):
    guest.send(make(RST))
    assert guest.received() == []
    assert stream.recv(1) == b""
    statistics = guest.device.statistics()
    assert (statistics.connections, statistics.resets_in, statistics.resets_out) == (0, 1, 0)


def test_when_the_guest_has_ended_a_slow_host_still_gets_all_it_had_sent(guest, make, stream):
    data = random.Random(4).randbytes(700_000)
    sent = 0
    while guest.device.statistics().unsent_bytes < 100_000:
        guest.send(make(RW, data[sent : sent + 50_000]))
        sent += 50_000
    guest.tx.add([make(RW, b"the last words").pack()], [])
    guest.device.hang_up()
    received = bytearray()
    while chunk := stream.recv(1 << 20):
        received += chunk
        guest.loop.run()
    assert received == data[:sent] + b"the last words"
    assert guest.device.statistics().connections == 0


def test_when_the_guest_has_ended_hosts_read_end_of_stream_and_are_refused(guest, make, stream):
    guest.device.hang_up()
    assert stream.recv(1) == b""
    error = run_in_thread(guest, partial(guest.device.connect, 52))
    assert error.errno == errno.ECONNREFUSED
    guest.device.hang_up()


# ---- hostile guests ----


@pytest.mark.parametrize("op", range(10))
def test_a_packet_of_no_connection_is_answered_with_a_reset_unless_it_is_one(guest, make, op):
    guest.send(make(op, dst_port=6))
    assert [p.op for p in guest.received()] == ([] if op == RST else [RST])


@pytest.mark.parametrize("size", [0, 1, 43])
def test_a_chain_shorter_than_a_header_is_dropped(guest, size):
    guest.send(bytes(size))
    assert len(guest.tx.used) == 1
    assert guest.received() == []
    assert guest.device.statistics().malformed == 1


@pytest.mark.parametrize("size", [4, 65536, 0x7FFFFFFF, 0xFFFFFFFF - 43, 0xFFFFFFFF])
def test_a_length_beyond_the_chain_resets_the_connection(guest, make, stream, size):
    guest.send(make(RW, b"abc", size=size))
    assert ops(guest.received()) == [(RST, 0)]
    assert stream.recv(10) == b""


@pytest.mark.parametrize("src_cid", [0, 1, 2, 4, 0xFFFFFFFF, 3 | 1 << 32, 1 << 63])
def test_a_packet_from_an_address_that_is_not_the_guests_is_dropped(guest, make, src_cid):
    guest.send(make(REQUEST, src_cid=src_cid))
    assert guest.received() == []
    assert guest.accepted == []


@pytest.mark.parametrize("dst_cid", [0, 1, 3, 4, 2 | 1 << 32])
def test_a_packet_to_another_address_is_reset_from_there(guest, make, dst_cid):
    guest.send(make(REQUEST, dst_cid=dst_cid))
    (answer,) = guest.received()
    assert (answer.op, answer.src_cid, answer.dst_cid) == (RST, dst_cid, 3)


@pytest.mark.parametrize("kind", [0, 2, 3, 65535])
def test_a_socket_type_that_is_not_offered_is_reset_with_that_type(guest, make, kind):
    guest.send(make(REQUEST, type=kind))
    (answer,) = guest.received()
    assert (answer.op, answer.type) == (RST, kind)


def test_packets_that_need_resets_wait_while_there_are_no_buffers_for_those(guest, make):
    guest.take_rx_buffers()
    guest.send(*[make(RW, src_port=port, dst_port=6) for port in range(RESET_LIMIT + 50)])
    assert len(guest.tx.used) == RESET_LIMIT
    guest.offer(100)
    guest.offer(300)
    assert [p.dst_port for p in guest.received()] == list(range(RESET_LIMIT + 50))
    assert len(guest.tx.used) == RESET_LIMIT + 50


def test_a_flood_of_connections_is_bounded(guest, make):
    refused = closed = 0
    for start in range(0, 10_000, 100):
        guest.send(*[make(REQUEST, src_port=port) for port in range(start, start + 100)])
        refused += sum(p.op == RST for p in guest.received())
        if start == 5000:
            closed = len(guest.accepted)
            guest.close_accepted()
        guest.offer(200)
    statistics = guest.device.statistics()
    assert statistics.connections == guest.device._mux.capacity <= MAX_CONNECTIONS
    assert closed == guest.device._mux.capacity
    assert statistics.connections_opened == 2 * closed
    assert statistics.connections_opened + refused == 10_000 + closed  # each it gave up for a new one got a reset


def test_the_table_leaves_file_descriptors_for_others(make_guest):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        guest = make_guest()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert guest.device._mux.capacity == 100
    guest.finish()


def test_a_full_table_refuses_until_a_connection_ends(guest, make):
    guest.device._mux.capacity = 3
    guest.send(*[make(REQUEST, src_port=port) for port in range(1, 5)])
    assert [(p.op, p.dst_port) for p in guest.received()] == [(RST, 4), (RESPONSE, 1), (RESPONSE, 2), (RESPONSE, 3)]
    guest.send(make(RST, src_port=2), make(REQUEST, src_port=4))
    assert [(p.op, p.dst_port) for p in guest.received()] == [(RESPONSE, 4)]


def test_a_full_table_gives_up_connections_whose_host_has_left(guest, make):
    guest.device._mux.capacity = 2
    guest.send(make(REQUEST, src_port=1), make(REQUEST, src_port=2))
    os.close(guest.accepted.pop(0))
    guest.loop.run()
    guest.received()
    guest.send(make(REQUEST, src_port=3))
    assert [(p.op, p.dst_port) for p in guest.received()] == [(RST, 1), (RESPONSE, 3)]


def test_many_connections_get_small_buffers(guest, make, monkeypatch):
    monkeypatch.setattr("kvmlite.devices.vsock.mux.MANY_CONNECTIONS", 1)
    guest.send(make(REQUEST, src_port=1), make(REQUEST, src_port=2))
    assert [p.buf_alloc for p in guest.received()] == [262144, 32768]


_hostile = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from([1000, 1001]), st.sampled_from([5, 6, FIRST_HOST_PORT]), st.integers(0, 8),
            st.binary(max_size=300), st.integers(0, 4), st.sampled_from([0, 1, 100, 65536, 2**32 - 1]),
            st.sampled_from([0, 1, 50, 2**32 - 1]), st.sampled_from([None, None, None, 0, 301, 2**32 - 1]),
        ),
        st.binary(max_size=60),
        st.sampled_from(["host writes", "host closes", "host reads", "buffers", "host connects"]),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(_hostile)
def test_no_guest_brings_the_device_down(make_guest, events):
    guest = make_guest()
    try:
        for event in events:
            if isinstance(event, tuple):
                guest.send(guest.packet_type(*event))
            elif isinstance(event, bytes):
                guest.send(event)
            else:
                guest.play_host(event)
            assert guest.device.statistics().unsent_bytes <= 2 * 262144
        assert not guest.tx.pending or not guest.rx.pending
    finally:
        guest.finish()


def test_more_packets_than_one_visit_takes_are_taken_in_the_next(guest, make, stream):
    guest.send(*[make(RW, b"%03d" % number) for number in range(400)])
    received = stream.recv(2000)
    guest.loop.run()  # the host's socket is full of small packets long before its bytes count
    assert received + stream.recv(2000) == b"".join(b"%03d" % number for number in range(400))
    assert len(guest.tx.used) == 401


def test_a_guest_that_finds_no_file_descriptors_left_is_refused(guest, make):
    with of_descriptors(0):
        guest.device.process_queue(1)
        guest.tx.add([make(REQUEST).pack()], [])
        guest.device.process_queue(1)
    assert ops(guest.received()) == [(RST, 0)]


def test_work_left_when_the_loop_stops_is_dropped_quietly(guest, make, stream, monkeypatch):
    def refuse(function):
        raise StateError("the device loop has stopped")

    monkeypatch.setattr(guest.loop, "post", refuse)
    guest.send(*[make(RW, b"x")] * 400)
    assert len(guest.tx.used) == 257
    guest.send(make(REQUEST, src_port=1001))
    assert (RST, 0) in ops(guest.received())


# ---- reset ----


def test_reset_ends_all_streams_and_the_next_activation_starts_afresh(guest, make, stream):
    guest.take_rx_buffers()
    guest.send(make(CREDIT_REQUEST), make(REQUEST, dst_port=6))  # answers that never go out
    guest.device.reset()
    assert stream.recv(1) == b""
    guest.device.process_queue(0)
    guest.device.process_queue(1)
    guest.loop.run()
    guest.activate()
    guest.offer()
    assert guest.received() == []
    guest.send(make(REQUEST))
    assert ops(guest.received()) == [(RESPONSE, 0)]


def test_transport_reset_drops_streams_and_uses_an_event_buffer(guest, make, stream):
    guest.event.add([], [4])
    guest.device.send_transport_reset()
    assert [(entry.data, entry.written) for entry in guest.event.used] == [(b"\0\0\0\0", 4)]
    assert stream.recv(1) == b""
    assert guest.received() == []


def test_transport_reset_waits_for_an_event_buffer_that_can_hold_it(guest):
    guest.device.send_transport_reset()
    guest.event.add([], [3])
    guest.event.add([], [8])
    guest.device.process_queue(2)
    guest.device.process_queue(2)
    guest.event.add([], [8])
    guest.device.process_queue(2)
    assert [entry.written for entry in guest.event.used] == [0, 4]


def test_statistics_count_both_directions(guest, make, stream):
    guest.send(make(RW, b"12345"))
    stream.send(b"123")
    guest.loop.run()
    statistics = guest.device.statistics()
    assert (statistics.bytes_in, statistics.bytes_out) == (5, 3)
    assert (statistics.packets_in, statistics.packets_out) == (2, 2)
    assert (statistics.connections, statistics.connections_opened) == (1, 1)


class ThreadedLoop(DeviceLoop):
    """The real loop; ``run`` waits until it has seen what was there before."""

    def run(self):
        for _ in range(3):
            self.call(lambda: None)


def test_it_works_on_the_real_loop_and_closes_after_that_has_stopped(make_guest, make):
    before = set(os.listdir("/proc/self/fd"))
    errors = []
    loop = ThreadedLoop(errors.append)
    loop.start()
    guest = make_guest(loop=loop)
    process_queue = guest.device.process_queue
    guest.device.process_queue = lambda index: loop.call(partial(process_queue, index))
    guest.send(make(REQUEST), make(RW, b"up"))
    with socket.socket(fileno=guest.accepted.pop()) as host:
        assert host.recv(10) == b"up"
        host.send(b"down")
        while guest.device.statistics().bytes_out < 4:
            loop.run()
        assert connect_from_host(guest, make, RST).errno == errno.ECONNREFUSED
        loop.stop()
        guest.device.close()
        assert host.recv(10) == b""
    assert errors == []
    guest.memory.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_no_descriptor_is_left_open(make_guest):
    before = set(os.listdir("/proc/self/fd"))
    guest = make_guest()
    for port in range(1, 30):
        guest.send(guest.packet_type(port, 5, REQUEST), guest.packet_type(port, 5, RW, b"x"))
    guest.play_host("host closes")
    guest.send(guest.packet_type(3, 5, SHUTDOWN, flags=BOTH), guest.packet_type(4, 5, RST))
    guest.finish()
    assert set(os.listdir("/proc/self/fd")) == before
