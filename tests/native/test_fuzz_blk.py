"""The block device in C against hostile drivers and a failing disk, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "src" / "kvmlite" / "_native" / "src"
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror"]
NEEDED = ("blk", "blk_request", "bucket", "cow", "disk", "fileio", "irq", "mem", "timer", "uring", "virtq", "worker")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = str(tmp_path_factory.mktemp("fuzz") / "fuzz_blk")
    sources = [str(HERE / "fuzz_blk.c"), *(str(NATIVE / f"{name}.c") for name in NEEDED)]
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}", "-pthread"]
    subprocess.run(["gcc", *WARNINGS, *flags, *sources, "-o", program], check=True, timeout=100)
    return program


def run(command: list[str]) -> list[int]:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()]


def test_no_request_reaches_outside_guest_ram_or_the_disk(fuzzer: str) -> None:
    served, failed, refused = run([fuzzer, "1", "20000"])
    assert served > 100_000, "hardly any request got through: the rings are too broken to test anything"
    assert failed > 1000
    assert refused > 1000


def test_nor_do_requests_that_change_meanwhile(fuzzer: str) -> None:
    served, _, _ = run([fuzzer, "2", "5000", "race"])
    assert served > 100
