"""Interrupts into the guest (irqfd, lines, routing) and kicks out of it (ioeventfd)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.machines import built, enter_ring3, vcpus, vm_of

from kvmlite.host.eventfd import EventFd
from kvmlite.machine.outcome import Exited

pytestmark = pytest.mark.kvm

Assemble = Callable[[str], Path]

# Says "R" on the console when interrupts are on, and ends with status 2 * 7 + 1 when one arrives.
WAIT_FOR_INTERRUPT = """
    take_interrupts 0x30, arrived
    route_pin {pin}, 0x30
    outb 0x52, 0x3f8
    sti
1:  hlt
    jmp 1b
arrived:
    debug_exit 7
"""


@pytest.fixture
def eventfd() -> Iterator[EventFd]:
    fd = EventFd()
    yield fd
    fd.close()


@pytest.mark.parametrize("gsi", [5, 10, 23])
def test_an_irqfd_wakes_a_halted_guest(assemble: Assemble, eventfd: EventFd, gsi: int) -> None:
    with built(assemble(WAIT_FOR_INTERRUPT.format(pin=gsi))) as machine:
        vm_of(machine).add_irqfd(eventfd.fd, gsi)
        machine.start()
        while machine.console_tail() != b"R":
            time.sleep(0.001)
        with pytest.raises(TimeoutError):
            machine.wait(0.05)
        eventfd.signal()
        assert machine.wait(30).outcome == Exited(code=15)


def test_an_interrupt_signalled_before_the_guest_looks_is_not_lost(assemble: Assemble, eventfd: EventFd) -> None:
    source = """
        take_interrupts 0x30, arrived
        route_pin 9, 0x30
        outb 0x52, 0x3f8
        mov $100000, %ecx
    1:  loop 1b
        sti
    2:  hlt
        jmp 2b
    arrived:
        debug_exit 7
    """
    with built(assemble(source)) as machine:
        vm_of(machine).add_irqfd(eventfd.fd, 9)
        machine.start()
        while machine.console_tail() != b"R":
            time.sleep(0.001)
        eventfd.signal()
        assert machine.wait(30).outcome == Exited(code=15)


def test_an_interrupt_line_wakes_a_halted_guest(assemble: Assemble) -> None:
    with built(assemble(WAIT_FOR_INTERRUPT.format(pin=11))) as machine:
        machine.start()
        while machine.console_tail() != b"R":
            time.sleep(0.001)
        vm_of(machine).set_irq_line(11, 1)
        vm_of(machine).set_irq_line(11, 0)
        assert machine.wait(30).outcome == Exited(code=15)


def test_ioapic_routing_is_accepted_and_delivers(assemble: Assemble, eventfd: EventFd) -> None:
    with built(assemble(WAIT_FOR_INTERRUPT.format(pin=10))) as machine:
        vm_of(machine).set_ioapic_routing()
        vm_of(machine).add_irqfd(eventfd.fd, 10)
        machine.start()
        while machine.console_tail() != b"R":
            time.sleep(0.001)
        eventfd.signal()
        assert machine.wait(30).outcome == Exited(code=15)


def test_an_msi_route_delivers_its_vector(assemble: Assemble, eventfd: EventFd) -> None:
    with built(assemble(WAIT_FOR_INTERRUPT.format(pin=10))) as machine:
        vm_of(machine).set_ioapic_routing({24: (0xFEE00000, 0x30)})
        vm_of(machine).add_irqfd(eventfd.fd, 24)
        machine.start()
        while machine.console_tail() != b"R":
            time.sleep(0.001)
        eventfd.signal()
        assert machine.wait(30).outcome == Exited(code=15)


def test_an_ioeventfd_signals_and_does_not_exit(assemble: Assemble, eventfd: EventFd) -> None:
    with built(assemble("movl $1, 0xe0000050; movl $2, 0xe0000050; debug_exit 0")) as machine:
        vm_of(machine).add_ioeventfd(eventfd.fd, 0xE0000050, 4)
        machine.start()
        report = machine.wait(30)
    assert os.eventfd_read(eventfd.fd) == 2
    assert report.statistics.exits_by_reason == {"KVM_EXIT_IO": 1}


def test_a_datamatch_takes_only_its_value(assemble: Assemble, eventfd: EventFd) -> None:
    with built(assemble("movl $0, 0xe0000050; movl $3, 0xe0000050; movw $3, 0xe0000050; debug_exit 0")) as machine:
        vm_of(machine).add_ioeventfd(eventfd.fd, 0xE0000050, 4, datamatch=3)
        machine.start()
        report = machine.wait(30)
    assert os.eventfd_read(eventfd.fd) == 1
    assert report.statistics.exits_by_reason == {"KVM_EXIT_IO": 1, "KVM_EXIT_MMIO": 2}


def test_each_datamatch_has_its_own_eventfd(assemble: Assemble, eventfd: EventFd) -> None:
    other = EventFd()
    try:
        with built(assemble("movl $1, 0xe0000050; movl $0, 0xe0000050; movl $1, 0xe0000050; debug_exit 0")) as machine:
            vm_of(machine).add_ioeventfd(eventfd.fd, 0xE0000050, 4, datamatch=0)
            vm_of(machine).add_ioeventfd(other.fd, 0xE0000050, 4, datamatch=1)
            machine.start()
            report = machine.wait(30)
        assert (os.eventfd_read(eventfd.fd), os.eventfd_read(other.fd)) == (1, 2)
        assert "KVM_EXIT_MMIO" not in report.statistics.exits_by_reason
    finally:
        other.close()


def test_a_port_ioeventfd_signals_and_does_not_exit(assemble: Assemble, eventfd: EventFd) -> None:
    with built(assemble("outb 5, 0x710; debug_exit 0")) as machine:
        vm_of(machine).add_ioeventfd(eventfd.fd, 0x710, 1, port=True)
        machine.start()
        report = machine.wait(30)
    assert os.eventfd_read(eventfd.fd) == 1
    assert report.statistics.exits_by_reason == {"KVM_EXIT_IO": 1}


def test_a_ring_3_guest_kicks_and_exits(assemble: Assemble, eventfd: EventFd) -> None:
    source = """
        mov $100000, %ecx
    1:  loop 1b
        mov $200, %ecx
    2:  movl $0, 0xe0000050
        loop 2b
        debug_exit 4
    """
    with built(assemble(source)) as machine:
        vm_of(machine).add_ioeventfd(eventfd.fd, 0xE0000050, 4, datamatch=0)
        enter_ring3(vcpus(machine)[0])
        machine.start()
        report = machine.wait(30)
    assert report.outcome == Exited(code=9)
    assert os.eventfd_read(eventfd.fd) == 200
    assert report.statistics.exits_by_reason["KVM_EXIT_IO"] == 1
    assert "KVM_EXIT_MMIO" not in report.statistics.exits_by_reason
