"""The token bucket in C, on a clock of the test's own."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmlite._native import ffi, lib

SECOND = 10**9


def make(rate: int, burst: int, now: int = 5 * SECOND) -> Any:
    bucket = ffi.new("struct kvl_bucket *")
    lib.kvl_bucket_init(bucket, rate, burst, now)
    return bucket


def test_a_full_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket, now = make(100, 10), 5 * SECOND
    for _ in range(10):
        assert lib.kvl_bucket_wait_ns(bucket, now) == 0
        lib.kvl_bucket_take(bucket, 1)
    assert lib.kvl_bucket_wait_ns(bucket, now) == SECOND // 100 + 1
    assert lib.kvl_bucket_wait_ns(bucket, now + SECOND // 100) == 0


def test_what_is_more_than_there_is_is_owed() -> None:
    bucket, now = make(1000, 1000), 5 * SECOND
    lib.kvl_bucket_take(bucket, 5000)
    assert lib.kvl_bucket_wait_ns(bucket, now) == 4001 * SECOND // 1000 + 1
    assert lib.kvl_bucket_wait_ns(bucket, now + 4 * SECOND) > 0
    assert lib.kvl_bucket_wait_ns(bucket, now + 4001 * SECOND // 1000) == 0


def test_no_rate_is_no_limit() -> None:
    bucket = make(0, 0)
    lib.kvl_bucket_take(bucket, 2**63)
    assert lib.kvl_bucket_wait_ns(bucket, 5 * SECOND) == 0


def test_a_long_rest_fills_it_and_no_more() -> None:
    bucket = make(2**63, 2**63)
    assert (bucket.rate, bucket.burst) == (2**40, 2**40)
    lib.kvl_bucket_take(bucket, 2**63)
    assert lib.kvl_bucket_wait_ns(bucket, 2**63) == 0
    assert bucket.level == 2**40


def test_a_clock_that_was_read_earlier_fills_nothing() -> None:
    bucket, now = make(100, 10), 5 * SECOND
    lib.kvl_bucket_take(bucket, 1000)
    later = lib.kvl_bucket_wait_ns(bucket, now + SECOND // 100)
    assert later > 0
    assert lib.kvl_bucket_wait_ns(bucket, now) == later
    assert lib.kvl_bucket_wait_ns(bucket, now + SECOND // 100) == later


@given(
    rate=st.integers(1, 10**12),
    burst=st.integers(0, 10**10),
    steps=st.lists(st.tuples(st.integers(0, 3 * SECOND), st.integers(0, 10**9)), max_size=60),
)
def test_nobody_gets_more_than_burst_and_rate(rate: int, burst: int, steps: list[tuple[int, int]]) -> None:
    start = now = 5 * SECOND
    bucket = make(rate, burst, now)
    taken = last = 0
    for rest, amount in steps:
        now += rest
        wait = lib.kvl_bucket_wait_ns(bucket, now)
        if wait:
            now += wait
            assert lib.kvl_bucket_wait_ns(bucket, now) == 0, "waited as told and still refused"
        lib.kvl_bucket_take(bucket, amount)
        taken, last = taken + amount, amount
        allowed = max(burst, 1) + rate * (now - start) // SECOND
        assert taken - last <= allowed
