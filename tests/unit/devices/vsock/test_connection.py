"""The rules of one stream, without sockets or queues. VIRTIO 1.2, 5.10.6.3 and 5.10.6.5."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlite.devices.vsock.connection import Connection, Verdict
from kvmlite.devices.vsock.packet import Header

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
BOTH = 3


def header(op, size=0, flags=0, buf_alloc=65536, fwd_cnt=0):
    return Header(3, 2, 1000, 5, size, 1, op, flags, buf_alloc, fwd_cnt)


def control(connection):
    packets = []
    while connection.has_control:
        packets.append(Header.unpack(connection.next_control()))
    return packets


def requested():
    connection = Connection(3, 5, 1000, 65536)
    control(connection)
    return connection


def opened():
    connection = Connection.from_request(header(REQUEST), 65536)
    control(connection)
    return connection


def guest_sends_no_more():
    connection = opened()
    connection.receive(header(SHUTDOWN, flags=2))
    return connection


def guest_reads_no_more():
    connection = opened()
    connection.receive(header(SHUTDOWN, flags=1))
    return connection


def host_reads_no_more():
    connection = opened()
    connection.shut_host(1)
    control(connection)
    return connection


def host_left():
    connection = opened()
    connection.shut_host(BOTH)
    control(connection)
    return connection


def unannounced():
    return Connection(3, 5, 1000, 65536)


N, A, D, X, S, R, G = (
    Verdict.NOTHING, Verdict.ACCEPTED, Verdict.DATA, Verdict.DISCARD, Verdict.SHUTDOWN, Verdict.RESET, Verdict.GONE
)  # fmt: skip
# state: verdict for op 0 (invalid), REQUEST ... CREDIT_REQUEST, 8 and 65535 (unknown)
TABLE = {
    unannounced:         (R, R, R, G, R, R, R, R, R, R),
    requested:           (R, R, A, G, R, R, R, R, R, R),
    opened:              (R, R, R, G, S, D, N, N, R, R),
    guest_sends_no_more: (R, R, R, G, S, R, N, N, R, R),
    guest_reads_no_more: (R, R, R, G, S, D, N, N, R, R),
    host_reads_no_more:  (R, R, R, G, S, X, N, N, R, R),
    host_left:           (R, R, R, G, S, X, N, N, R, R),
}  # fmt: skip


@pytest.mark.parametrize("state", TABLE, ids=lambda state: state.__name__)
def test_each_op_in_each_state_has_its_verdict(state):
    ops = (*range(8), 8, 65535)
    assert tuple(state().receive(header(op, size=1)) for op in ops) == TABLE[state]


def test_a_request_of_the_host_is_announced_once():
    connection = Connection(3, 1 << 30, 52, 262144)
    assert not connection.is_known
    assert connection.next_control() == bytes.fromhex(
        "0200000000000000" "0300000000000000" "00000040" "34000000"
        "00000000" "0100" "0100" "00000000" "00000400" "00000000"
    )  # fmt: skip
    assert connection.is_known
    assert not connection.has_control


def test_a_guests_request_is_answered_with_a_response():
    connection = Connection.from_request(header(REQUEST), 262144)
    assert [packet.op for packet in control(connection)] == [RESPONSE]


def test_asking_for_a_control_packet_that_is_not_owed_is_a_bug():
    with pytest.raises(AssertionError, match="owed"):
        opened().next_control()


def test_credit_of_the_guest_shrinks_with_data_and_grows_with_its_counter():
    connection = opened()
    assert connection.credit == 65536
    connection.next_data(65000)
    assert connection.credit == 536
    connection.next_data(536)
    assert connection.credit == 0
    connection.receive(header(CREDIT_UPDATE, fwd_cnt=65000))
    assert connection.credit == 65000


def test_counters_towards_the_guest_wrap_at_32_bits():
    connection = opened()
    sent = 0
    for _ in range(70_000):
        connection.next_data(65536)
        sent = (sent + 65536) % 2**32
        connection.receive(header(CREDIT_UPDATE, fwd_cnt=sent))
    assert sent < 2**32 <= 70_000 * 65536
    assert connection.credit == 65536
    connection.next_data(1)
    assert connection.credit == 65535


def test_counters_from_the_guest_wrap_at_32_bits():
    connection = opened()
    for _ in range(65537):
        assert connection.receive(header(RW, size=65536)) is Verdict.DATA
        connection.forward(65536)
    assert Header.unpack(connection.next_control()).fwd_cnt == 65536
    assert connection.unforwarded == 0


@pytest.mark.parametrize(("buf_alloc", "fwd_cnt"), [(0, 0), (10, 0xFFFFFFFF), (10, 11), (5, 0)])
def test_a_guest_whose_counters_make_no_sense_gets_nothing(buf_alloc, fwd_cnt):
    connection = opened()
    connection.next_data(10)
    connection.receive(header(CREDIT_UPDATE, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt))
    assert connection.credit == 0


def test_a_guest_may_fill_the_buffer_and_not_one_byte_more():
    connection = opened()
    assert connection.receive(header(RW, size=65536)) is Verdict.DATA
    assert connection.receive(header(RW, size=0)) is Verdict.DATA
    assert connection.receive(header(RW, size=1)) is Verdict.RESET


def test_a_huge_length_is_beyond_any_credit():
    assert opened().receive(header(RW, size=0xFFFFFFFF)) is Verdict.RESET


def test_an_update_is_owed_for_each_quarter_of_the_buffer():
    connection = opened()
    connection.receive(header(RW, size=16384))
    connection.forward(16383)
    assert not connection.has_control
    connection.forward(1)
    packet = Header.unpack(connection.next_control())
    assert (packet.op, packet.buf_alloc, packet.fwd_cnt) == (CREDIT_UPDATE, 65536, 16384)


def test_a_data_packet_carries_the_counters_so_that_no_update_is_owed():
    connection = opened()
    connection.receive(header(RW, size=20000))
    connection.forward(20000)
    assert Header.unpack(connection.next_data(1)).fwd_cnt == 20000
    assert not connection.has_control


def test_a_credit_request_is_answered_once_however_often_it_is_asked():
    connection = opened()
    for _ in range(1000):
        connection.receive(header(CREDIT_REQUEST))
    assert [packet.op for packet in control(connection)] == [CREDIT_UPDATE]


def test_shutdown_flags_accumulate_and_are_never_taken_back():
    connection = opened()
    connection.receive(header(SHUTDOWN, flags=2))
    connection.receive(header(SHUTDOWN, flags=0))
    assert connection.guest_shutdown == 2
    connection.receive(header(SHUTDOWN, flags=0xFFFFFFF1))
    assert connection.guest_shutdown == BOTH


def test_the_host_shutting_down_in_steps_tells_the_guest_twice():
    connection = opened()
    connection.shut_host(2)
    connection.shut_host(2)
    assert [(p.op, p.flags) for p in control(connection)] == [(SHUTDOWN, 2)]
    connection.shut_host(1)
    assert [(p.op, p.flags) for p in control(connection)] == [(SHUTDOWN, BOTH)]


_packets = st.builds(
    Header, st.just(3), st.just(2), st.just(1000), st.just(5),
    st.one_of(st.integers(0, 70000), st.integers(0, 2**32 - 1)),
    st.just(1), st.one_of(st.integers(0, 8), st.integers(0, 65535)),
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(TABLE)), st.lists(_packets, max_size=30))
def test_no_sequence_of_packets_makes_a_connection_hold_more_than_its_buffer(state, packets):
    connection = state()
    for packet in packets:
        verdict = connection.receive(packet)
        assert connection.unforwarded <= 65536
        assert 0 <= connection.credit < 2**32
        if verdict is Verdict.DISCARD:
            connection.forward(packet.size)
        if verdict in (Verdict.RESET, Verdict.GONE):
            break
    assert len(control(connection)) <= 5
