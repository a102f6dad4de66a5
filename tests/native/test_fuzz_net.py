"""A network card's queue pair in C against hostile drivers and hosts, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "src" / "kvmlite" / "_native" / "src"
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror"]
NEEDED = ("bucket", "egress", "irq", "mem", "net", "net_receive", "net_stream", "timer", "virtq", "worker")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = str(tmp_path_factory.mktemp("fuzz") / "fuzz_net")
    sources = [str(HERE / "fuzz_net.c"), *(str(NATIVE / f"{name}.c") for name in NEEDED)]
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}", "-pthread"]
    subprocess.run(["gcc", *WARNINGS, *flags, *sources, "-o", program], check=True, timeout=100)
    return program


def run(command: list[str]) -> list[int]:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()]


def test_no_frame_reaches_outside_guest_ram_or_past_the_rules(fuzzer: str) -> None:
    received, sent, refused, dropped, held = run([fuzzer, "1", "3000"])
    assert received > 1000, "hardly any frame got through: the rings are too broken to test anything"
    assert sent > 5000
    assert refused > 500
    assert dropped > 500
    assert held > 100, "hardly any acknowledgement was held back"


def test_nor_do_frames_in_rings_that_change_meanwhile(fuzzer: str) -> None:
    received, sent, *_ = run([fuzzer, "2", "600", "race"])
    assert received > 100
    assert sent > 100
