"""Exits, seen from the guest: what a port or an address answers, and how a machine ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmlite.machine.outcome import (
    Exited,
    ExitReport,
    Panicked,
    PoweredOff,
    Reset,
    TripleFault,
    VmmError,
)
from kvmlite.machine.run_loop import VcpuStopError

pytestmark = pytest.mark.kvm

RunGuest = Callable[..., ExitReport]
SCRATCH = 0x9000


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (0x15, 0x2B), (0x7F, 0xFF), (0xFF, 0xFF)])
def test_debug_exit_status_is_twice_the_value_plus_one(run_guest: RunGuest, value: int, status: int) -> None:
    report = run_guest(f"debug_exit {value}")
    assert report.outcome == Exited(code=status)
    assert report.exit_code == status


def test_debug_exit_takes_all_of_a_wide_write_modulo_256(run_guest: RunGuest) -> None:
    report = run_guest("mov $0xf4, %dx; mov $0x12340002, %eax; out %eax, %dx; 1: hlt; jmp 1b")
    assert report.outcome == Exited(code=5)


@pytest.mark.parametrize(
    ("port", "value"),
    [(0x64, 0xFE), (0x604, 1), (0xCF9, 0x06), (0xCF9, 0x0E)],
    ids=["i8042", "acpi", "pci", "pci-full"],
)
def test_each_reset_register_resets(run_guest: RunGuest, port: int, value: int) -> None:
    assert run_guest(f"outb {value}, {port}; debug_exit 1").outcome == Reset()


@pytest.mark.parametrize(
    ("port", "value"),
    [(0x64, 0xD1), (0x604, 0), (0xCF9, 0x02), (0x600, 0x14), (0x600, 0x20), (0x600, 0x30), (0x601, 0x34)],
    ids=["i8042-command", "acpi-zero", "pci-arm", "s5-without-enable", "s0", "s4", "status"],
)
def test_other_values_of_power_registers_do_nothing(run_guest: RunGuest, port: int, value: int) -> None:
    assert run_guest(f"outb {value}, {port}; debug_exit 1").outcome == Exited(code=3)


def test_acpi_sleep_control_powers_off(run_guest: RunGuest) -> None:
    report = run_guest("outb 0x34, 0x600; debug_exit 1")
    assert report.outcome == PoweredOff()
    assert report.exit_code is None


def test_a_reset_with_the_warm_flag_is_a_panic(run_guest: RunGuest) -> None:
    assert run_guest("movw $0x1234, 0x472; outb 0xfe, 0x64; 1: hlt; jmp 1b").outcome == Panicked()


def test_a_reset_with_another_flag_is_a_reset(run_guest: RunGuest) -> None:
    assert run_guest("movw $0x1235, 0x472; outb 0xfe, 0x64; 1: hlt; jmp 1b").outcome == Reset()


def test_a_triple_fault_names_its_vcpu(run_guest: RunGuest) -> None:
    report = run_guest("lidt kvl_empty_idtr; mov $0xff00, %ax; mov %ax, %ds; debug_exit 1")
    assert report.outcome == TripleFault(vcpu_id=0)
    assert report.statistics.exits_by_reason == {"KVM_EXIT_SHUTDOWN": 1}


def test_a_triple_fault_with_the_warm_flag_is_a_panic(run_guest: RunGuest) -> None:
    report = run_guest("movw $0x1234, 0x472; lidt kvl_empty_idtr; mov $0xff00, %ax; mov %ax, %ds; debug_exit 1")
    assert report.outcome == Panicked()


def test_an_exit_without_a_meaning_is_a_vmm_error_that_says_where(run_guest: RunGuest) -> None:
    # Code in a hole of guest RAM: KVM cannot fetch it and says so with an internal error.
    report = run_guest("mov $0xe0000000, %eax; jmp *%eax")
    assert isinstance(report.outcome, VmmError)
    assert isinstance(report.outcome.error, VcpuStopError)
    assert "vCPU 0 at rip 0xe0000000: KVM_EXIT_INTERNAL_ERROR" in str(report.outcome.error)
    assert "kvmlite doctor" in report.outcome.error.hint


def test_exits_are_counted_by_reason_and_address(run_guest: RunGuest) -> None:
    report = run_guest("outb 1, 0x80; outb 2, 0x80; mov 0xe0000000, %eax; debug_exit 0")
    assert report.statistics.exits_by_reason == {"KVM_EXIT_IO": 3, "KVM_EXIT_MMIO": 1}
    assert report.statistics.exits == 4
    assert report.statistics.python_exits == 1
    counts = {(c.kind, c.address): (c.owner, c.reads, c.writes) for c in report.statistics.addresses}
    assert counts == {
        ("port", 0x80): ("", 0, 2),
        ("port", 0xF4): ("debug-exit", 0, 1),
        ("mmio", 0xE0000000): ("", 1, 0),
    }
    assert report.statistics.addresses[0].address == 0x80  # most frequent first


def test_spans_come_in_order(run_guest: RunGuest) -> None:
    spans = run_guest("debug_exit 0").spans
    order = ["kvm ready", "kernel loaded", "first KVM_RUN", "ended"]
    assert sorted(order, key=spans.__getitem__) == order


@pytest.mark.parametrize(("register", "answer"), [("al", b"\xff\0\0\0"), ("ax", b"\xff\xff\0\0"), ("eax", b"\xff" * 4)])
def test_an_unclaimed_port_reads_all_ones(run_guest: RunGuest, register: str, answer: bytes) -> None:
    report = run_guest(f"""
        mov $0x500, %dx; xor %eax, %eax; in %dx, %{register}; mov %eax, {SCRATCH}
        print {SCRATCH}, 4
        debug_exit 0
    """)
    assert report.console == answer


def test_string_input_of_an_unclaimed_port_reads_all_ones(run_guest: RunGuest) -> None:
    report = run_guest(f"""
        mov $0x500, %dx; mov ${SCRATCH}, %edi; mov $4, %ecx; cld; rep insb
        print {SCRATCH}, 6
        debug_exit 0
    """)
    assert report.console == b"\xff\xff\xff\xff\0\0"


@pytest.mark.parametrize(
    ("port", "answer"), [(0x64, 0xFF), (0xF4, 0), (0x600, 0), (0x601, 0), (0x604, 0), (0xCF9, 0), (0x3FD, 0x60)]
)
def test_machine_registers_read_constants(run_guest: RunGuest, port: int, answer: int) -> None:
    report = run_guest(f"mov ${port}, %dx; in %dx, %al; mov %al, {SCRATCH}; print {SCRATCH}, 1; debug_exit 0")
    assert report.console == bytes([answer])


def test_the_console_says_what_the_guest_wrote(run_guest: RunGuest) -> None:
    report = run_guest('print message, 13; debug_exit 0; message: .ascii "Hello, world\\n"')
    assert report.console == b"Hello, world\n"
    assert report.statistics.serial_bytes == 13
