"""The fuzzer of devices that are served in Python: they stand it for a while, and it notices a device that is wrong."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.requirements import ROOT, lack

HERE = Path(__file__).resolve().parent
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py"))
CASES = 1500
TIMEOUT_S = 250

pytestmark = pytest.mark.timeout(600)

PYTHON_PATH = os.pathsep.join(str(ROOT / name) for name in ("scripts", "src"))

BROKEN_DEVICE = """
from fuzzkit.target import DeviceTarget
from kvmlite.devices.rng import VirtioRng

class Broken(VirtioRng):
    def process_queue(self, index):
        queue = self._queue
        if queue is None:
            return
        while (chain := queue.pop()) is not None:
            {harm}
        if queue.needs_interrupt():
            self._interrupt.raise_queue()

class Target(DeviceTarget):
    def attach(self, resources):
        return Broken(resources.name)
"""

# What a device does with a chain, and what is said of it.
HARMS = {
    "no exception but GuestFault": ("queue.add_used(chain.head_index, [][chain.writable_size])", "IndexError"),
    "a chain is lost": ("chain.write(b'')", "chains are not returned"),
    "a chain is returned twice": (
        "queue.add_used(chain.head_index, 0); queue.add_used(chain.head_index, 0)",
        "returns a chain it does not have",
    ),
    "more written than there is room": (
        "queue.add_used(chain.head_index, chain.writable_size + 1)",
        "claims to have written more",
    ),
    "more written than it says": (
        "chain.write(b'x' * 8); queue.add_used(chain.head_index, 0)",
        "guest RAM changed where the device must not write",
    ),
    "no rest": ("queue.add_used(chain.head_index, 0); queue.kick()\n        queue.kick()", "still busy"),
    "no end": ("[None for _ in iter(int, 1)]", "timeout"),
}


@dataclass(frozen=True)
class Fuzzer:
    """A built fuzzer.

    Attributes:
        library: What targets load.
        preload: What the interpreter needs for it.
        scratch: Where failed cases go.
    """

    library: Path
    preload: str
    scratch: Path

    def run(self, target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run libFuzzer on a target."""
        command = [sys.executable, "-m", "fuzzkit", str(self.library), str(target), f"-artifact_prefix={self.scratch}/"]
        environment = os.environ | {
            "PYTHONPATH": PYTHON_PATH,
            "LD_PRELOAD": self.preload,
            "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16",
        }
        return subprocess.run(
            [*command, "-seed=1", "-max_len=384", *arguments],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    library = ROOT / "build/fuzz/device/_kvl.abi3.so"  # that of scripts/fuzz, built anew if a source has changed
    built = subprocess.run(
        [sys.executable, "-m", "fuzzkit", "--build", str(library)],
        env=os.environ | {"PYTHONPATH": PYTHON_PATH},
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if "no clang" in built.stderr:
        lack("clang", "clang with libFuzzer is not installed")
    assert built.returncode == 0, built.stderr[-3000:]
    return Fuzzer(library, built.stdout.strip(), tmp_path_factory.mktemp("fuzz"))


def test_its_c_side_compiles_without_a_warning() -> None:
    strict = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror", "-fsyntax-only"]
    sources = [f"-I{ROOT / 'src/kvmlite/_native/src'}", str(HERE / "device_fuzzer.c")]
    subprocess.run(["gcc", *strict, *sources], check=True, timeout=TIMEOUT_S)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_drivers_do_no_harm(fuzzer: Fuzzer, tmp_path: Path, name: str) -> None:
    found = str(tmp_path)  # libFuzzer writes to the first directory
    done = fuzzer.run(HERE / f"fuzz_{name}.py", f"-runs={CASES}", found, str(HERE / "corpus" / name))
    assert done.returncode == 0, done.stderr[-3000:]
    served, broken = (int(part.split()[-1]) for part in done.stderr.splitlines()[-1].split(","))
    assert served > CASES // 2, "hardly any chain got through: the rings are too broken to test anything"
    assert broken > 0


@pytest.mark.parametrize("rule", HARMS)
def test_a_device_that_breaks_a_rule_is_found(fuzzer: Fuzzer, tmp_path: Path, rule: str) -> None:
    harm, said = HARMS[rule]
    found = tmp_path / "found"
    found.mkdir()
    target = tmp_path / "fuzz_broken.py"
    target.write_text(BROKEN_DEVICE.format(harm=harm))
    limit = "-timeout=1" if said == "timeout" else "-timeout=60"
    done = fuzzer.run(target, "-runs=5000", limit, str(found), str(HERE / "corpus/rng"))
    assert done.returncode != 0
    assert said in done.stderr
    kept = [line.split()[-1] for line in done.stderr.splitlines() if "Test unit written to" in line]
    again = fuzzer.run(target, limit, kept[0])
    assert again.returncode != 0, "the case that was kept does not fail again"
    assert said in again.stderr


def test_branches_of_python_code_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from fuzzkit.branches import NAME, Marker

    source = "def sign(x):\n    'Doc.'\n    if x < 0:\n        return -1\n    for _ in range(x):\n        return 1\n    return 0\n"
    tree = Marker(0, 256).visit(ast.parse(source))
    seen = []
    for value in (-1, 0, 1):
        space: dict[str, Any] = {NAME: bytearray(256)}
        exec(compile(ast.fix_missing_locations(tree), "sign", "exec"), space)
        assert space["sign"].__doc__ == "Doc."
        assert space["sign"](value) == value
        seen.append(bytes(space[NAME]))
    assert len(set(seen)) == 3
