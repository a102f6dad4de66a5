"""The LZ4 decoder under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "src" / "kvmlite" / "_native" / "src"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path_factory.mktemp("lz4") / "lz4_driver"
    subprocess.run(
        [
            *(compiler, "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *(
                "-I",
                str(SOURCE),
                str(HERE / "lz4_driver.c"),
                str(SOURCE / "lz4.c"),
                "-o",
                str(program),
            ),
        ],
        check=True,
        timeout=120,
    )
    return program


def test_damaged_blocks_touch_nothing_outside_their_buffers(driver):
    done = subprocess.run([driver, "40000"], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    decoded = int(done.stdout.split()[2])
    # Both ends of the decoder were reached: blocks that decode and blocks that do not.
    assert 2000 < decoded < 38000
