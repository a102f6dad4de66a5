"""The C data plane compiles without a warning in the strict set, and its pure parts run clean under sanitizers."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.requirements import clang
from support.sanitized import NATIVE, STRICT, compile_sanitized, run_sanitized

MAX_LINES = 500


def sources() -> list[str]:
    return sorted(path.name for path in NATIVE.glob("*.c"))


def headers() -> list[str]:
    return sorted(path.name for path in NATIVE.glob("*.h"))


@pytest.fixture(scope="module")
def complaints() -> dict[tuple[str, str], str]:
    """``(compiler, file) -> what it says`` for every file and every compiler that is installed; all processors compile."""
    compilers = {name: path for name, path in (("gcc", "gcc"), ("clang", clang())) if path}
    files = [*sources(), *headers()]
    pairs = [(name, file) for name in compilers for file in files if name == "gcc" or file.endswith(".c")]

    def complain(pair: tuple[str, str]) -> str:
        name, file = pair
        command = [compilers[name], *STRICT, "-fsyntax-only", "-x", "c", str(NATIVE / file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stderr or str(result.returncode or "")

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return dict(zip(pairs, executor.map(complain, pairs), strict=True))


@pytest.mark.parametrize("compiler", ["gcc", pytest.param("clang", marks=pytest.mark.clang)])
@pytest.mark.parametrize("source", sources())
def test_each_source_compiles_without_a_warning(
    complaints: dict[tuple[str, str], str], source: str, compiler: str
) -> None:
    assert complaints[compiler, source] == ""


@pytest.mark.parametrize("header", headers())
def test_each_header_stands_alone(complaints: dict[tuple[str, str], str], header: str) -> None:
    assert complaints["gcc", header] == ""


@pytest.mark.parametrize("source", sources())
def test_c_files_stay_readable(source: str) -> None:
    assert len((NATIVE / source).read_text().splitlines()) < MAX_LINES


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """``source -> names that the linker sees``."""
    directory = tmp_path_factory.mktemp("objects")

    def compile_and_list(source: str) -> list[str]:
        compiled = directory / f"{source}.o"
        subprocess.run(["gcc", "-std=gnu11", "-c", "-o", compiled, str(NATIVE / source)], check=True)
        command = ["nm", "--defined-only", "--extern-only", compiled]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [line.split()[-1] for line in listed.splitlines() if line]

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return dict(zip(sources(), executor.map(compile_and_list, sources()), strict=True))


@pytest.mark.parametrize("source", sources())
def test_symbols_have_our_prefix(symbols: dict[str, list[str]], source: str) -> None:
    """What the linker sees begins with kvl_: an embedding program has names of its own."""
    assert symbols[source]
    assert [symbol for symbol in symbols[source] if not symbol.startswith("kvl_")] == []


def test_serial_and_memory_run_clean_under_sanitizers(tmp_path: Path) -> None:
    program = compile_sanitized(tmp_path / "serial_mem", ["serial", "mem"])
    assert run_sanitized(program) == "ok\n"
