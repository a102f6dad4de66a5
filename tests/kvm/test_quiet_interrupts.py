"""A virtio-mmio device whose registers the guest reads, and whose interrupts it acknowledges, without leaving (ADR 9)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.machines import run_to_end
from support.recorder_device import Recorder

from kvmlite.abi.kvm import KVM_CAP_COALESCED_MMIO, KVM_CAP_READONLY_MEM
from kvmlite.kvm.vm import Vm
from kvmlite.machine.outcome import Exited, ExitReport
from kvmlite.virtio.device import DeviceResources

pytestmark = pytest.mark.kvm

Assemble = Callable[[str], Path]

SCRATCH = 0x9000
# Registers of the first device.
MAGIC, QUEUE_SEL, QUEUE_NUM_MAX, STATUS, ACK, DEVICE_STATUS, GENERATION, CONFIG = (
    0xD0000F00 + offset for offset in (0x00, 0x30, 0x34, 0x60, 0x64, 0x70, 0xFC, 0x100)
)
BRING_UP = "".join(f"movl ${value}, {DEVICE_STATUS:#x};" for value in (1, 3)) + (
    f"movl $1, {0xD0000F24:#x}; movl $1, {0xD0000F20:#x};"  # VERSION_1
    f"movl $11, {DEVICE_STATUS:#x}; movl $15, {DEVICE_STATUS:#x};"
)


class Spec:
    """A recorder in the machine's first slot."""

    def __init__(self, prepare: Callable[[Recorder], None] = lambda device: None) -> None:
        self._prepare = prepare

    def attach(self, resources: DeviceResources) -> Recorder:
        device = Recorder(resources.name)
        self._prepare(device)
        return device


def look(*addresses: int) -> str:
    """Assembly: the words at these addresses, to the console."""
    loads = "".join(f"mov {address:#x}, %eax; mov %eax, {SCRATCH + 4 * i:#x};" for i, address in enumerate(addresses))
    return f"{loads} print {SCRATCH:#x}, {4 * len(addresses)};"


def words(report: ExitReport) -> list[int]:
    data = report.console
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def mmio_exits(report: ExitReport) -> int:
    return report.statistics.exits_by_reason.get("KVM_EXIT_MMIO", 0)


def refuse(monkeypatch: pytest.MonkeyPatch, *capabilities: int) -> None:
    """Have KVM lack these."""
    real = Vm.check_extension
    monkeypatch.setattr(Vm, "check_extension", lambda vm, number: 0 if number in capabilities else real(vm, number))


def test_loads_of_registers_are_no_exits(assemble: Assemble) -> None:
    report = run_to_end(
        assemble(look(MAGIC, MAGIC + 4, MAGIC + 8, STATUS, DEVICE_STATUS) + "debug_exit 0"), devices=(Spec(),)
    )
    assert words(report) == [0x74726976, 2, 42, 0, 0]
    assert mmio_exits(report) == 0


def test_what_a_store_changes_is_there_to_be_read(assemble: Assemble) -> None:
    source = f"{look(QUEUE_NUM_MAX)} movl $1, {QUEUE_SEL:#x}; {look(QUEUE_NUM_MAX)} {BRING_UP} {look(DEVICE_STATUS)}"
    source += f"movl $0, {DEVICE_STATUS:#x}; {look(DEVICE_STATUS, QUEUE_NUM_MAX)} debug_exit 0"
    report = run_to_end(assemble(source), devices=(Spec(),))
    assert words(report) == [16, 8, 15, 0, 16]
    assert mmio_exits(report) == 8  # the stores


def test_a_read_only_register_keeps_its_value(assemble: Assemble) -> None:
    report = run_to_end(
        assemble(f"movl $5, {MAGIC:#x}; movb $5, {STATUS:#x}; {look(MAGIC, STATUS)} debug_exit 0"), devices=(Spec(),)
    )
    assert words(report) == [0x74726976, 0]
    assert mmio_exits(report) == 2


def test_configuration_space_is_the_device_s_to_answer(assemble: Assemble) -> None:
    report = run_to_end(assemble(look(CONFIG, CONFIG + 4) + "debug_exit 0"), devices=(Spec(),))
    assert words(report) == [0x03020100, 0x07060504]
    assert mmio_exits(report) == 2


def test_a_broken_driver_is_asked_for_a_reset_in_the_page(assemble: Assemble) -> None:
    # Queue 0 is ready with more descriptors than it may have.
    queue = "".join(f"movl ${value}, {0xD0000F00 + offset:#x};" for offset, value in ((0x30, 0), (0x38, 32), (0x44, 1)))
    source = BRING_UP.replace(f"movl $15, {DEVICE_STATUS:#x};", queue + f"movl $15, {DEVICE_STATUS:#x};")
    report = run_to_end(assemble(f"{source} {look(DEVICE_STATUS, STATUS)} debug_exit 0"), devices=(Spec(),))
    assert words(report) == [15 | 64, 2]


ACKNOWLEDGE_OFTEN = f"""
    mov $1000, %ecx
1:  movl $3, {ACK:#x}
    loop 1b
    {look(STATUS)}
    debug_exit 0
"""


def test_acknowledgements_are_exits_only_when_the_ring_is_full(assemble: Assemble) -> None:
    report = run_to_end(assemble(ACKNOWLEDGE_OFTEN), devices=(Spec(), Spec()))
    assert words(report) == [0]
    assert 1 <= mmio_exits(report) <= 10


def test_without_a_ring_each_acknowledgement_is_an_exit(assemble: Assemble, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, KVM_CAP_COALESCED_MMIO)
    assert mmio_exits(run_to_end(assemble(ACKNOWLEDGE_OFTEN), devices=(Spec(),))) == 1000


# Shows the status at each of two interrupts: the first when the driver is up, the second when it has written a zero to
# configuration space, which it does when it has acknowledged the first.
TWO_INTERRUPTS = f"""
    take_interrupts 0x30, arrived
    route_pin 5, 0x30
    {BRING_UP}
    sti
1:  hlt
    jmp 1b
arrived:
    {look(STATUS)}
    mov {STATUS:#x}, %eax
    mov %eax, {ACK:#x}
    movl $0, 0xfee000b0
    incl {SCRATCH + 64:#x}
    cmpl $2, {SCRATCH + 64:#x}
    je 2f
    movb $0, {CONFIG:#x}
    sti
3:  hlt  # an emulator of ring 0 may lack iret
    jmp 3b
2:  {look(GENERATION)}
    debug_exit 7
"""


def say_config_then_queue(device: Recorder) -> None:
    def activate() -> None:
        assert device.interrupt is not None
        device.interrupt.raise_config()

    def write_config(offset: int, data: bytes) -> None:
        assert device.interrupt is not None
        device.interrupt.raise_queue()

    device.on_activate = activate
    device.write_config = write_config  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "missing", [(), (KVM_CAP_READONLY_MEM,), (KVM_CAP_COALESCED_MMIO,), (KVM_CAP_READONLY_MEM, KVM_CAP_COALESCED_MMIO)]
)
def test_an_interrupt_finds_what_was_acknowledged_before_it_gone(
    assemble: Assemble, monkeypatch: pytest.MonkeyPatch, missing: tuple[int, ...]
) -> None:
    refuse(monkeypatch, *missing)
    report = run_to_end(assemble(TWO_INTERRUPTS), devices=(Spec(say_config_then_queue),))
    assert report.outcome == Exited(code=15)
    assert words(report) == [2, 1, 1]


def test_a_shared_interrupt_comes_from_its_eventfd_and_always_shows_the_queue(assemble: Assemble) -> None:
    def share(device: Recorder) -> None:
        def activate() -> None:
            assert device.interrupt is not None
            assert device.interrupt.share() == device.interrupt.share()
            os.eventfd_write(device.interrupt.share(), 1)

        def write_config(offset: int, data: bytes) -> None:
            assert device.interrupt is not None
            device.interrupt.raise_config()

        device.on_activate = activate
        device.write_config = write_config  # type: ignore[method-assign]

    report = run_to_end(assemble(TWO_INTERRUPTS), devices=(Spec(share),))
    assert report.outcome == Exited(code=15)
    assert words(report) == [1, 3, 1]


def test_each_device_has_its_own_page(assemble: Assemble) -> None:
    second = 0xD0002F00
    source = f"movl $1, {second + 0x70:#x}; {look(DEVICE_STATUS, second + 0x70)} debug_exit 0"
    assert words(run_to_end(assemble(source), devices=(Spec(), Spec()))) == [0, 1]


def test_a_device_that_outlives_its_machine_does_no_harm(assemble: Assemble) -> None:
    made: list[Recorder] = []
    report = run_to_end(assemble(f"{BRING_UP} debug_exit 0"), devices=(Spec(made.append),))
    assert report.outcome == Exited(code=1)
    interrupt = made[0].interrupt
    assert interrupt is not None
    interrupt.raise_config()
    interrupt.raise_queue()
