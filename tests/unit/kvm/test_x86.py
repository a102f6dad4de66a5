"""The first state of a vCPU, without KVM: descriptor tables and the CPUID topology."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlite._native import ffi
from kvmlite.kvm.x86 import set_topology


def table(*leaves: tuple[int, int]) -> Any:
    """A ``struct kvm_cpuid2 *`` with these (function, index) and recognisable values."""
    cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": len(leaves)})
    cpuid.nent = len(leaves)
    for position, (function, index) in enumerate(leaves):
        entry = cpuid.entries[position]
        entry.function, entry.index = function, index
        entry.eax = entry.ebx = entry.ecx = entry.edx = 0xFFFFFFFF
    return cpuid


def test_leaf_1_names_the_vcpu_and_the_count() -> None:
    cpuid = table((1, 0))
    set_topology(cpuid, 3, 4, tsc_deadline=True)
    leaf = cpuid.entries[0]
    assert leaf.ebx == 0x0304FFFF
    assert leaf.ecx & 1 << 31  # hypervisor
    assert leaf.edx & 1 << 28  # HTT


def test_leaf_1_of_a_single_vcpu_has_no_htt() -> None:
    cpuid = table((1, 0))
    set_topology(cpuid, 0, 1, tsc_deadline=False)
    assert cpuid.entries[0].ebx == 0x0001FFFF
    assert not cpuid.entries[0].edx & 1 << 28


@pytest.mark.parametrize(("count", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (255, 8)])
def test_leaf_0xb_describes_cores_without_threads(count: int, bits: int) -> None:
    cpuid = table((0xB, 0), (0xB, 1), (0xB, 2))
    set_topology(cpuid, count - 1, count, tsc_deadline=False)
    found = [(leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) for leaf in (cpuid.entries[n] for n in range(3))]
    assert found == [(0, 1, 0x100, count - 1), (bits, count, 0x201, count - 1), (0, 0, 2, count - 1)]


@pytest.mark.parametrize("leaf", [4, 0x8000001D])
def test_the_last_level_cache_is_shared_by_all(leaf: int) -> None:
    cpuid = table((leaf, 2), (leaf, 3), (leaf, 4))
    cpuid.entries[0].eax = 2 | 2 << 5
    cpuid.entries[1].eax = 3 | 3 << 5
    cpuid.entries[2].eax = 0  # no more caches: left alone
    set_topology(cpuid, 0, 4, tsc_deadline=False)
    shared = [(cpuid.entries[n].eax >> 14) & 0xFFF for n in range(3)]
    assert shared == [0, 3, 0]


def test_amd_core_count_is_set() -> None:
    cpuid = table((0x80000008, 0), (0x8000001E, 0))
    set_topology(cpuid, 2, 6, tsc_deadline=False)
    assert cpuid.entries[0].ecx & 0xF0FF == 3 << 12 | 5
    assert (cpuid.entries[1].eax, cpuid.entries[1].ebx, cpuid.entries[1].ecx) == (2, 2, 0)


def test_leaves_without_topology_stay_as_they_are() -> None:
    cpuid = table((0, 0), (7, 0), (0x40000000, 0))
    set_topology(cpuid, 1, 2, tsc_deadline=True)
    for position in range(3):
        leaf = cpuid.entries[position]
        assert (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0xFFFFFFFF,) * 4
