"""How the parts of a machine are given back."""

from __future__ import annotations

import pytest

from kvmlite.errors import HostError, StateError
from kvmlite.host.eventfd import EventFd
from kvmlite.machine.builder import Parts
from kvmlite.machine.config import Kernel, MachineConfig
from kvmlite.machine.machine import Machine
from kvmlite.memory.guest_memory import GuestMemory


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def close(self) -> None:
        raise self.error


def test_all_is_closed_whatever_fails() -> None:
    parts = Parts()
    memory, irq = parts.own(GuestMemory(4096)), parts.own(EventFd())
    parts.own(Failing(HostError("first")))
    parts.own(Failing(HostError("second")))
    with pytest.raises(HostError, match="second"):
        parts.close()
    assert (memory.regions, irq.fd) == ((), -1)


def test_memory_and_interrupts_outlive_a_thread_that_the_host_holds() -> None:
    parts = Parts()
    memory, irq = parts.own(GuestMemory(4096), is_lent=True), parts.own(EventFd(), is_lent=True)
    own_affair = parts.own(EventFd())
    parts.own(Failing(StateError("disk0-0 has not stopped")))
    parts.own(Failing(HostError("first")))
    with pytest.raises(HostError, match="first"):
        parts.close()
    assert own_affair.fd == -1
    memory.write(0, b"a late answer")
    irq.signal()
    memory.close()
    irq.close()


def test_a_machine_whose_closing_was_interrupted_gives_the_rest_back_the_next_time() -> None:
    machine = Machine(MachineConfig(kernel=Kernel(path="vmlinux")))
    memory = machine._parts.own(GuestMemory(4096))
    machine._parts.own(Failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        machine.close()
    assert memory.regions
    machine.close()
    assert memory.regions == ()
    assert machine.state == "stopped"
