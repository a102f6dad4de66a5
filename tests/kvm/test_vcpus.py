"""Several vCPUs in one machine, and what vCPU file descriptors say."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.machines import bare_config, built, vcpus

from kvmlite.abi import kvm
from kvmlite.bus import Bus
from kvmlite.errors import KvmError
from kvmlite.kvm.system import Kvm
from kvmlite.kvm.vcpu import Vcpu, init_kick_signal
from kvmlite.kvm.vm import Vm
from kvmlite.machine import Machine
from kvmlite.machine.outcome import Exited, Stopped

pytestmark = pytest.mark.kvm

Assemble = Callable[[str], Path]

# Starts CPU 1 at 0x8000 by INIT and SIPI; it leaves 0x5a at 0x9000.
START_SECOND = """
    mov $trampoline, %esi
    mov $0x8000, %edi
    mov $(trampoline_end - trampoline), %ecx
    cld
    rep movsb
    movl $0x1ff, 0xfee000f0
    movl $0x01000000, 0xfee00310
    movl $0x4500, 0xfee00300
    movl $0x4608, 0xfee00300
1:  cmpb $0x5a, 0x9000
    jne 1b
    debug_exit 3
.code16
trampoline:
    xor %ax, %ax
    mov %ax, %ds
    movb $0x5a, (0x9000)
    cli
2:  hlt
    jmp 2b
trampoline_end:
.code32
"""


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm() as system:
        vm = system.create_vm()
    vm.create_irqchip()
    yield vm
    vm.close()


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    init_kick_signal()
    bus = Bus()
    vcpu = vm.create_vcpu(0, bus.native)
    yield vcpu
    vcpu.close()


def test_a_second_vcpu_starts_by_init_and_sipi(assemble: Assemble) -> None:
    with Machine(bare_config(assemble(START_SECOND), vcpu_count=2)) as machine:
        machine.start()
        assert machine.wait(30).outcome == Exited(code=7)


@pytest.mark.usefixtures("mappings")
def test_eight_vcpus_are_made_paused_and_stopped(assemble: Assemble) -> None:
    with Machine(bare_config(assemble("1: jmp 1b"), vcpu_count=8)) as machine:
        machine.start()
        time.sleep(0.02)
        machine.pause()
        machine.resume()
        machine.stop()
        assert machine.wait(30).outcome == Stopped()


def test_vcpus_that_never_started_are_dead_with_the_first(assemble: Assemble) -> None:
    with Machine(bare_config(assemble("cli; 1: hlt; jmp 1b"), vcpu_count=4)) as machine:
        machine.start()
        deadline = time.monotonic() + 30
        while not machine.is_dead():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_waiting_vcpus_count_no_exits_while_idle(assemble: Assemble) -> None:
    with Machine(bare_config(assemble("cli; 1: hlt; jmp 1b"), vcpu_count=4)) as machine:
        machine.start()
        time.sleep(0.05)
        machine.stop()
        assert machine.wait(30).statistics.exits <= 8  # the kick that stopped each, and one more at most


def test_each_vcpu_is_told_its_own_apic_id(assemble: Assemble) -> None:
    source = "mov $1, %eax; cpuid; shr $24, %ebx; mov %bl, 0x9000; print 0x9000, 1; debug_exit 0"
    with built(assemble(source), vcpu_count=3) as machine:
        assert [vcpu.vcpu_id for vcpu in vcpus(machine)] == [0, 1, 2]
        machine.start()
        assert machine.wait(30).console == b"\0"


def test_vcpus_after_the_first_wait_for_sipi(assemble: Assemble) -> None:
    with built(assemble("debug_exit 0"), vcpu_count=3) as machine:
        states = [vcpu.get_mp_state() for vcpu in vcpus(machine)]
    assert states == [kvm.KVM_MP_STATE_RUNNABLE, kvm.KVM_MP_STATE_UNINITIALIZED, kvm.KVM_MP_STATE_UNINITIALIZED]


def test_registers_read_back_as_written(vcpu: Vcpu) -> None:
    vcpu.set_regs({"rax": 0x1122334455667788, "r15": 0xFFFFFFFFFFFFFFFF, "rip": 0x1000, "rflags": 2})
    regs = vcpu.get_regs()
    assert (regs.rax, regs.r15, regs.rip, regs.rbx) == (0x1122334455667788, 0xFFFFFFFFFFFFFFFF, 0x1000, 0)


def test_an_unknown_register_name_is_refused(vcpu: Vcpu) -> None:
    with pytest.raises(KeyError, match="eax"):
        vcpu.set_regs({"eax": 1})


def test_an_msr_that_kvm_refuses_is_named(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match=r"KVM_SET_MSRS\(index=0x7fffffff\)") as caught:
        vcpu.set_msrs({0x1A0: 1, 0x7FFFFFFF: 0})
    assert caught.value.errno == errno.EINVAL


def test_the_same_vcpu_twice_is_a_kvm_error(vm: Vm, vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU\(vcpu_id=0\): File exists") as caught:
        vm.create_vcpu(0, Bus().native)
    assert caught.value.errno == errno.EEXIST
    assert caught.value.call == "KVM_CREATE_VCPU(vcpu_id=0)"


def test_overlapping_memory_slots_are_a_kvm_error(vm: Vm) -> None:
    import mmap

    from kvmlite._native import ffi

    with mmap.mmap(-1, 8192) as memory:
        view = ffi.from_buffer(memory, require_writable=True)
        hva = int(ffi.cast("uintptr_t", view))
        vm.set_memory_slot(0, 0x1000, 4096, hva)
        with pytest.raises(KvmError, match=r"slot=1, gpa=0x1000, size=0x1000\): File exists"):
            vm.set_memory_slot(1, 0x1000, 4096, hva + 4096)
        vm.set_memory_slot(0, 0x1000, 0, hva)
        ffi.release(view)


def test_a_kick_before_run_makes_run_return_at_once(vcpu: Vcpu) -> None:
    vcpu.kick()
    assert vcpu.run().reason == kvm.KVM_EXIT_INTR


def test_a_kick_after_close_does_nothing(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0, Bus().native)
    vcpu.close()
    vcpu.kick()
    vcpu.close()
    assert vcpu.fd == -1


def test_extensions_that_kvmlite_needs_are_there(vm: Vm) -> None:
    for capability in (kvm.KVM_CAP_IRQFD, kvm.KVM_CAP_IOEVENTFD, kvm.KVM_CAP_IMMEDIATE_EXIT, kvm.KVM_CAP_USER_MEMORY):
        assert vm.check_extension(capability) > 0
    assert vm.check_extension(9999) == 0
