"""What a test lacks skips it and says so; named by KVMLITE_REQUIRE it fails the test. No test skips in another way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.requirements import REQUIREMENTS, ROOT, lack, required

TESTS = """
import pytest
from support.requirements import lack

@pytest.mark.cpio
def test_marked(): assert False

def test_finds_out_itself(): lack("io_uring", "the host has none")

def test_needs_nothing(): pass
"""

# Those that want something not to be there: nobody can require it.
OTHER_SKIPS = {
    "tests/kvm/test_probe.py": "an emulated host needs 50 ms",
    "tests/kvm/test_promises.py": "there is nothing to refuse",
    "tests/kvm/test_ram.py": "the host has a pool of huge pages",
    "tests/unit/boot/test_image.py": "root reads every file",
}


def run(folder: Path, words: str) -> tuple[int, str]:
    """Run TESTS under the rules of this directory, on a machine without programs."""
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = os.environ | {
        "KVMLITE_REQUIRE": words,
        "PATH": str(folder),
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'src'}",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-rs",
        str(folder),
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_is_lacking_skips_with_the_reason(tmp_path: Path) -> None:
    status, output = run(tmp_path, "")
    assert status == 0
    assert "1 passed, 2 skipped" in output
    assert "no cpio on this machine" in output
    assert "the host has none" in output


def test_what_is_required_fails_with_the_reason(tmp_path: Path) -> None:
    status, output = run(tmp_path, "clang, cpio,io_uring")
    assert status == 1
    assert "1 failed, 1 passed, 1 error" in output  # before the test, and in it
    assert "KVMLITE_REQUIRE=cpio: no cpio on this machine" in output
    assert "KVMLITE_REQUIRE=io_uring: the host has none" in output


def test_a_word_that_requires_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMLITE_REQUIRE", "kvm,cipo")
    with pytest.raises(ValueError, match=r"KVMLITE_REQUIRE names cipo; known: kvm, "):
        required()
    with pytest.raises(ValueError, match="cipo is none of the requirements"):
        lack("cipo", "it is not there")


def test_each_requirement_is_a_marker() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = [line.partition(":")[0] for line in settings["tool"]["pytest"]["ini_options"]["markers"]]
    assert sorted(markers) == sorted(REQUIREMENTS)


@pytest.mark.parametrize("script", [".ci/run", "scripts/test"])
def test_what_is_required_of_our_machines_exists(script: str) -> None:
    words = re.findall(r"(?:KVMLITE_REQUIRE|LAB_HAS)=([a-z_,0-9]+)", (ROOT / script).read_text())
    assert words
    assert {word for found in words for word in found.split(",")} <= REQUIREMENTS.keys()


def test_nothing_is_skipped_in_another_way() -> None:
    skips = re.compile(r"pytest\.(?:skip\(|mark\.skip|importorskip)|skip_?[tT]est")
    found = {}
    for path in (ROOT / "tests").rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if skips.search(line)]
        if lines and path.name not in ("requirements.py", "test_requirements.py", "test_second_look.py"):
            found[str(path.relative_to(ROOT))] = lines
    assert found.keys() == OTHER_SKIPS.keys(), "to say what a test lacks, use a marker or support.requirements.lack"
    for path, reason in OTHER_SKIPS.items():
        assert len(found[path]) == 1
        assert reason in found[path][0]
