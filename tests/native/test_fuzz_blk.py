"""The block device in C against hostile drivers and a failing disk, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import pytest
from support.sanitized import compile_sanitized, counts

NEEDED = ("blk", "blk_request", "bucket", "cow", "disk", "fileio", "irq", "mem", "timer", "uring", "virtq", "worker")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_sanitized(tmp_path_factory.mktemp("fuzz") / "fuzz_blk", NEEDED)


def test_no_request_reaches_outside_guest_ram_or_the_disk(fuzzer: str) -> None:
    served, failed, refused = counts(fuzzer, "1", "20000")
    assert served > 100_000, "hardly any request got through: the rings are too broken to test anything"
    assert failed > 1000
    assert refused > 1000


def test_nor_do_requests_that_change_meanwhile(fuzzer: str) -> None:
    served, _, _ = counts(fuzzer, "2", "5000", "race")
    assert served > 100
