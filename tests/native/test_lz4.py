"""The LZ4 decoder under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

from pathlib import Path

from support.sanitized import compile_sanitized, run_sanitized


def test_damaged_blocks_touch_nothing_outside_their_buffers(tmp_path: Path) -> None:
    driver = compile_sanitized(tmp_path / "lz4_driver", ["lz4"])
    decoded = int(run_sanitized(driver, "40000").split()[2])
    # Both ends of the decoder were reached: blocks that decode and blocks that do not.
    assert 2000 < decoded < 38000
