"""Architectural x86 constants used to build a vCPU's first state (Intel SDM vol. 3, AMD APM vol. 2)."""

from __future__ import annotations

CR0_PE = 1 << 0
CR0_MP = 1 << 1
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_WP = 1 << 16
CR0_PG = 1 << 31

CR4_PAE = 1 << 5

EFER_LME = 1 << 8
EFER_LMA = 1 << 10

RFLAGS_RESERVED = 1 << 1
RFLAGS_IF = 1 << 9

MSR_IA32_MISC_ENABLE = 0x1A0
MSR_IA32_MISC_ENABLE_FAST_STRING = 1 << 0
MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLE_WRITE_BACK = (1 << 11) | 6

# Segment descriptor types (SDM vol. 3, 3.4.5.1): accessed bit set, as KVM wants them.
SEGMENT_CODE_EXECUTE_READ = 0xB
SEGMENT_DATA_READ_WRITE = 0x3
SEGMENT_TSS_BUSY = 0xB

# CPUID leaves and the fields kvmlite sets
CPUID_1_EBX_APIC_ID_SHIFT = 24
CPUID_1_EBX_COUNT_SHIFT = 16
CPUID_1_ECX_TSC_DEADLINE = 1 << 24
CPUID_1_ECX_HYPERVISOR = 1 << 31
CPUID_1_EDX_HTT = 1 << 28
