"""The first state of an x86 vCPU: segments, control registers, CPUID topology."""

from __future__ import annotations

from kvmlite.abi import x86

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmlite.kvm.vcpu import Vcpu

_FLAT_LIMIT = 0xFFFFFFFF
CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
TSS_SELECTOR = 0x20


def _set_segment(segment: Any, selector: int, kind: int, *, long: bool = False) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, _FLAT_LIMIT, selector, kind
    segment.present, segment.dpl, segment.s, segment.g, segment.unusable = 1, 0, 1, 1, 0
    segment.l, segment.db = (1, 0) if long else (0, 1)


def _set_flat_segments(sregs: Any, *, long: bool) -> None:
    _set_segment(sregs.cs, CODE_SELECTOR, x86.SEGMENT_CODE_EXECUTE_READ, long=long)
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        _set_segment(segment, DATA_SELECTOR, x86.SEGMENT_DATA_READ_WRITE)
    tss = sregs.tr
    tss.base, tss.limit, tss.selector, tss.type = 0, 0x67, TSS_SELECTOR, x86.SEGMENT_TSS_BUSY
    tss.present, tss.s, tss.g, tss.db, tss.l, tss.unusable = 1, 0, 0, 0, 0, 0


def enter_protected32(vcpu: Vcpu, *, gdt: int, gdt_size: int) -> None:
    """32-bit protected mode without paging, flat segments, interrupts off (PVH and multiboot ask for this)."""
    sregs = vcpu.get_sregs()
    _set_flat_segments(sregs, long=False)
    sregs.gdt.base, sregs.gdt.limit = gdt, gdt_size - 1
    sregs.cr0 = x86.CR0_PE | x86.CR0_ET
    sregs.cr4 = 0
    sregs.efer = 0
    vcpu.set_sregs(sregs)


def enter_long64(vcpu: Vcpu, *, gdt: int, gdt_size: int, page_table: int) -> None:
    """64-bit mode on identity page tables (Linux boot protocol, 64-bit)."""
    sregs = vcpu.get_sregs()
    _set_flat_segments(sregs, long=True)
    sregs.gdt.base, sregs.gdt.limit = gdt, gdt_size - 1
    sregs.cr3 = page_table
    sregs.cr4 = x86.CR4_PAE
    sregs.cr0 = x86.CR0_PE | x86.CR0_MP | x86.CR0_ET | x86.CR0_NE | x86.CR0_WP | x86.CR0_PG
    sregs.efer = x86.EFER_LME | x86.EFER_LMA
    vcpu.set_sregs(sregs)


def set_topology(cpuid: Any, vcpu_id: int, vcpu_count: int, *, tsc_deadline: bool) -> None:
    """Describe one socket of ``vcpu_count`` cores without threads, seen from vCPU ``vcpu_id``.

    Edits the table in place. Leaves: 1 and 4 (SDM vol. 2, CPUID), 0xb and 0x1f (extended topology), 0x80000008 and
    0x8000001e (AMD APM vol. 3, E.4).
    """
    core_bits = (vcpu_count - 1).bit_length()
    for position in range(cpuid.nent):
        entry = cpuid.entries[position]
        leaf = entry.function
        if leaf == 1:
            _set_leaf_1(entry, vcpu_id, vcpu_count, tsc_deadline=tsc_deadline)
        elif leaf == 4 and entry.eax & 0x1F:
            shared_by = vcpu_count - 1 if (entry.eax >> 5) & 7 == 3 else 0
            entry.eax = (entry.eax & 0x3FFF) | (shared_by << 14) | (((1 << core_bits) - 1) << 26)
        elif leaf in (0xB, 0x1F):
            _set_extended_topology(entry, vcpu_id, vcpu_count, core_bits)
        elif leaf == 0x80000008:
            entry.ecx = (entry.ecx & ~0xF0FF) | (core_bits << 12) | (vcpu_count - 1)
        elif leaf == 0x8000001D and entry.eax & 0x1F:
            shared_by = vcpu_count - 1 if (entry.eax >> 5) & 7 == 3 else 0
            entry.eax = (entry.eax & 0x3FFF) | (shared_by << 14)
        elif leaf == 0x8000001E:
            entry.eax, entry.ebx, entry.ecx = vcpu_id, vcpu_id & 0xFF, 0


def _set_leaf_1(entry: Any, vcpu_id: int, vcpu_count: int, *, tsc_deadline: bool) -> None:
    entry.ebx = (
        (entry.ebx & 0xFFFF)
        | (min(vcpu_count, 255) << x86.CPUID_1_EBX_COUNT_SHIFT)
        | ((vcpu_id & 0xFF) << x86.CPUID_1_EBX_APIC_ID_SHIFT)
    )
    entry.ecx |= x86.CPUID_1_ECX_HYPERVISOR
    if tsc_deadline:
        entry.ecx |= x86.CPUID_1_ECX_TSC_DEADLINE
    if vcpu_count > 1:
        entry.edx |= x86.CPUID_1_EDX_HTT
    else:
        entry.edx &= ~x86.CPUID_1_EDX_HTT & 0xFFFFFFFF


def _set_extended_topology(entry: Any, vcpu_id: int, vcpu_count: int, core_bits: int) -> None:
    """Level 0 is the thread (one per core), level 1 the core, then nothing."""
    level = entry.index
    kinds = {0: (0, 1, 1), 1: (core_bits, vcpu_count, 2)}
    shift, count, kind = kinds.get(level, (0, 0, 0))
    entry.eax, entry.ebx, entry.ecx, entry.edx = shift, count, (kind << 8) | level, vcpu_id
