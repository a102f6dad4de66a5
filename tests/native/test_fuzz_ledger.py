"""The ledger of chains under way in C against hostile rings, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "src" / "kvmlite" / "_native" / "src"
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror"]
NEEDED = ("ledger", "mem", "virtq", "worker", "timer", "irq")
TIMEOUT_S = 250


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = str(tmp_path_factory.mktemp("fuzz") / "fuzz_ledger")
    sources = [str(HERE / "fuzz_ledger.c"), *(str(NATIVE / f"{name}.c") for name in NEEDED)]
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}", "-pthread"]
    subprocess.run(["gcc", *WARNINGS, *flags, *sources, "-o", program], check=True, timeout=TIMEOUT_S)
    return program


def run(command: list[str]) -> list[int]:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()]


def test_the_ledger_is_exact_or_knows_that_it_is_not(fuzzer: str) -> None:
    known, lost = run([fuzzer, "1", "5000"])
    assert known > 10000, "hardly any update saw honest rings"
    assert lost > 100, "hardly any update saw hostile rings"


def test_it_stays_within_its_bounds_while_the_rings_change(fuzzer: str) -> None:
    _, lost = run([fuzzer, "2", "600", "race"])
    assert lost > 100
