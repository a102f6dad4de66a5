"""The egress filter in C against hostile frames, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "src" / "kvmlite" / "_native" / "src"
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror"]
CASES = 300_000


def test_no_hostile_frame_is_allowed_without_a_reason(tmp_path: Path) -> None:
    program = str(tmp_path / "fuzz_egress")
    sources = [str(HERE / "fuzz_egress.c"), str(NATIVE / "egress.c")]
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}"]
    subprocess.run(["gcc", *WARNINGS, *flags, *sources, "-o", program], check=True, timeout=60)
    done = subprocess.run([program, "1", str(CASES)], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    allowed, with_header = map(int, done.stdout.split())
    assert CASES // 50 < allowed < CASES // 2, "the frames are too good or too broken to test anything"
    assert with_header > 100
