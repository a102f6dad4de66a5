"""A network card's queue pair in C against hostile drivers and hosts, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import pytest
from support.sanitized import compile_sanitized, counts

NEEDED = ("bucket", "egress", "irq", "mem", "net", "net_receive", "net_stream", "timer", "virtq", "worker")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_sanitized(tmp_path_factory.mktemp("fuzz") / "fuzz_net", NEEDED)


def test_no_frame_reaches_outside_guest_ram_or_past_the_rules(fuzzer: str) -> None:
    received, sent, refused, dropped, held = counts(fuzzer, "1", "3000")
    assert received > 1000, "hardly any frame got through: the rings are too broken to test anything"
    assert sent > 5000
    assert refused > 500
    assert dropped > 500
    assert held > 100, "hardly any acknowledgement was held back"


def test_nor_do_frames_in_rings_that_change_meanwhile(fuzzer: str) -> None:
    received, sent, *_ = counts(fuzzer, "2", "600", "race")
    assert received > 100
    assert sent > 100
