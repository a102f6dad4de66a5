"""Promises of SPECIFICATION.md that need a Linux kernel."""

from __future__ import annotations

import os

import pytest

import kvmlite

pytestmark = pytest.mark.guest

PYTHON_EXITS_LIMIT = 500


@pytest.mark.timeout(330)
@pytest.mark.parametrize("package", ["linux-image-cloud-amd64", "linux-image-amd64"])
def test_a_boot_hands_few_exits_to_python(package: str) -> None:
    kernels = os.environ.get("KVMLITE_TEST_KERNELS")
    if not kernels or not os.path.isdir(os.path.join(kernels, package)):
        pytest.skip(f"KVMLITE_TEST_KERNELS has no {package}: run scripts/setup kernels")
    result = kvmlite.run(["true"], kernel=os.path.join(kernels, package), timeout=300).check()
    assert 0 < result.report.statistics.python_exits < PYTHON_EXITS_LIMIT
