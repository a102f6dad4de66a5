"""The ledger of chains under way in C against hostile rings, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import pytest
from support.sanitized import compile_sanitized, counts

NEEDED = ("ledger", "mem", "virtq", "worker", "timer", "irq")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_sanitized(tmp_path_factory.mktemp("fuzz") / "fuzz_ledger", NEEDED)


def test_the_ledger_is_exact_or_knows_that_it_is_not(fuzzer: str) -> None:
    known, lost = counts(fuzzer, "1", "5000")
    assert known > 10000, "hardly any update saw honest rings"
    assert lost > 100, "hardly any update saw hostile rings"


def test_it_stays_within_its_bounds_while_the_rings_change(fuzzer: str) -> None:
    _, lost = counts(fuzzer, "2", "600", "race")
    assert lost > 100
