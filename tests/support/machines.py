"""Short ways to run a machine under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmlite.kvm.vcpu import Vcpu
from kvmlite.kvm.vm import Vm
from kvmlite.machine import Kernel, Machine, MachineConfig
from kvmlite.machine.outcome import ExitReport
from kvmlite.memory import GuestMemory


def bare_config(kernel: Path, **values: Any) -> MachineConfig:
    """A machine of 16 MiB, unless ``values`` say otherwise."""
    return MachineConfig(kernel=Kernel(path=str(kernel)), **{"memory_mib": 16, **values})


def run_to_end(kernel: Path, *, timeout_s: float = 60.0, **values: Any) -> ExitReport:
    """Start it, wait for its end."""
    with Machine(bare_config(kernel, **values)) as machine:
        machine.start()
        return machine.wait(timeout_s)


@contextmanager
def built(kernel: Path, **values: Any) -> Iterator[Machine]:
    """A machine that is built and not started, so that a test can put something into it first."""
    with Machine(bare_config(kernel, **values)) as machine:
        machine.build()
        yield machine


def ram(machine: Machine) -> GuestMemory:
    """Guest RAM of a built machine."""
    return machine._parts.memory


def vcpus(machine: Machine) -> list[Vcpu]:
    """vCPUs of a built machine."""
    return machine._parts.vcpus


def vm_of(machine: Machine) -> Vm:
    """The VM of a built machine."""
    return next(part for part, _ in machine._parts._owned if isinstance(part, Vm))


def enter_ring3(vcpu: Vcpu, *, iopl: int = 3) -> None:
    """Drop to ring 3 before the first instruction: even a software KVM runs that at native speed.

    Call it once, before the machine starts: KVM_GET_REGS of a software KVM forgets IOPL.
    """
    regs = vcpu.get_regs()
    sregs = vcpu.get_sregs()
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        segment.dpl = 3
        segment.selector |= 3
    vcpu.set_sregs(sregs)
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip")
    vcpu.set_regs({**{name: getattr(regs, name) for name in names}, "rflags": 2 | iopl << 12})
