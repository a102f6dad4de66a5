"""Promises of SPECIFICATION.md that need a Linux kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import kvmlite

pytestmark = pytest.mark.guest

PYTHON_EXITS_LIMIT = 500


@pytest.mark.timeout(330)
@pytest.mark.parametrize("name", ["6.1-cloud", "6.1"])
def test_a_boot_hands_few_exits_to_python(kernels: Callable[[str], Path], name: str) -> None:
    result = kvmlite.run(["true"], kernel=kernels(name), timeout=300).check()
    assert 0 < result.report.statistics.python_exits < PYTHON_EXITS_LIMIT
