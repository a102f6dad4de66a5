"""The virtqueue walker in C against hostile rings, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support.requirements import clang
from support.sanitized import compile_sanitized, run_sanitized

NEEDED = ("virtq", "mem")
FAULT_CODES = range(1, 17)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_sanitized(tmp_path_factory.mktemp("fuzz") / "fuzz_virtq", NEEDED)


def test_every_pointer_from_a_hostile_ring_is_inside_guest_ram(fuzzer: str) -> None:
    lines = run_sanitized(fuzzer, "1", "6000").splitlines()
    assert int(lines[0].split()[1]) > 1000, "hardly any chain got through: the rings are too broken to test anything"
    seen = {-int(line.split()[1]) for line in lines[1:] if int(line.split()[2]) > 0}
    assert seen == set(FAULT_CODES), "some faults were never met"


def test_rings_that_change_during_the_walk_yield_no_stray_pointer(fuzzer: str) -> None:
    lines = run_sanitized(fuzzer, "2", "2000", "race").splitlines()
    assert int(lines[0].split()[1]) > 100


def seeds() -> dict[str, bytes]:
    """Inputs for coverage-guided fuzzing: 8 bytes of layout, 96 steps, then guest RAM from the descriptor table on."""

    def ring(flags: int, descriptors: bytes, avail: bytes, table: bytes = b"") -> bytes:
        memory = descriptors.ljust(0x400, b"\0") + avail.ljust(0x400, b"\0") + table
        return bytes([3, flags]) + bytes(6) + bytes(range(96)) + memory

    describe = struct.Struct("<QIHH").pack
    avail = struct.pack("<HHHH", 0, 2, 0, 2)
    direct = describe(0x8000, 64, 1, 1) + describe(0x20000, 512, 2, 0) + describe(0x9000, 8, 0, 0)
    indirect = describe(0x1800, 32, 4, 0) + bytes(16) + describe(0x9000, 8, 0, 0)
    return {
        "direct": ring(0, direct, avail),
        "event-idx": ring(1, direct, avail),
        "indirect": ring(3, indirect, avail, describe(0x8000, 64, 1, 1) + describe(0x20000, 512, 2, 0)),
    }


@pytest.mark.clang
def test_coverage_guided_fuzzing_finds_no_stray_pointer(tmp_path: Path) -> None:
    compiler = clang()
    assert compiler
    flags = ("-DKVL_LIBFUZZER", "-fsanitize=fuzzer,address,undefined")
    target = compile_sanitized(tmp_path / "fuzz_virtq", NEEDED, compiler=compiler, flags=flags)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, data in seeds().items():
        (corpus / name).write_bytes(data)
    run_sanitized(
        target,
        "-seed=1",
        "-runs=3000",
        "-max_total_time=3",
        "-max_len=12000",
        f"-artifact_prefix={tmp_path}/",
        str(corpus),
    )
