"""The egress filter in C against hostile frames, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from pathlib import Path

from support.sanitized import compile_sanitized, counts

CASES = 300_000


def test_no_hostile_frame_is_allowed_without_a_reason(tmp_path: Path) -> None:
    program = compile_sanitized(tmp_path / "fuzz_egress", ["egress"])
    allowed, with_header = counts(program, "1", str(CASES))
    assert CASES // 50 < allowed < CASES // 2, "the frames are too good or too broken to test anything"
    assert with_header > 100
