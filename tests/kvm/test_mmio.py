"""Accesses to a device's addresses and ports: widths, values, counts, and what happens when the device has a bug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.machines import built

from kvmlite.machine.outcome import Exited, ExitReport, VmmError

pytestmark = pytest.mark.kvm

MMIO = 0xE0000000
PORT = 0x700
SCRATCH = 0x9000


class Recorder:
    """Device that notes each access and answers reads with 0x8877665544332211."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size, 0))
        return 0x8877665544332211

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))


class Broken:
    """Device with a bug."""

    def __init__(self) -> None:
        self.error = RuntimeError("bug in a device")

    def read(self, offset: int, size: int) -> int:
        raise self.error

    def write(self, offset: int, size: int, value: int) -> None:
        raise self.error


def run(kernel: Path, device: Recorder | Broken) -> ExitReport:
    """Run with the device at MMIO (4096 bytes) and PORT (4 ports)."""
    with built(kernel) as machine:
        machine._parts.bus.claim_mmio(MMIO, 0x1000, device, "recorder")
        machine._parts.bus.claim_ports(PORT, 4, device, "recorder")
        machine.start()
        return machine.wait(30)


@pytest.mark.parametrize(
    ("instruction", "size", "value"),
    [
        ("mov %al, 0xe0000010", 1, 0x44),
        ("mov %ax, 0xe0000010", 2, 0x3344),
        ("mov %eax, 0xe0000010", 4, 0x11223344),
        ("movl $0x55667788, 0xe0000010", 4, 0x55667788),
        ("mov %al, 0xe0000ffe", 1, 0x44),
    ],
)
def test_an_mmio_write_reaches_its_device(
    assemble: Callable[[str], Path], instruction: str, size: int, value: int
) -> None:
    device = Recorder()
    run(assemble(f"mov $0x11223344, %eax; {instruction}; debug_exit 0"), device)
    assert device.seen == [("write", 0xFFE if "ffe" in instruction else 0x10, size, value)]


@pytest.mark.parametrize(
    ("instruction", "size", "value"),
    [
        ("mov 0xe0000010, %al", 1, b"\x11\0\0\0"),
        ("mov 0xe0000010, %ax", 2, b"\x11\x22\0\0"),
        ("mov 0xe0000010, %eax", 4, b"\x11\x22\x33\x44"),
    ],
)
def test_an_mmio_read_gets_its_device_s_value(
    assemble: Callable[[str], Path], instruction: str, size: int, value: bytes
) -> None:
    device = Recorder()
    source = f"xor %eax, %eax; {instruction}; mov %eax, {SCRATCH}; print {SCRATCH}, 4; debug_exit 0"
    report = run(assemble(source), device)
    assert device.seen == [("read", 0x10, size, 0)]
    assert report.console == value


def test_an_mmio_write_of_eight_bytes_is_one_access(assemble: Callable[[str], Path]) -> None:
    device = Recorder()
    source = """
        movl $8, %ecx
        mov $operand, %esi
        movq (%esi), %mm0
        movq %mm0, 0xe0000018
        debug_exit 0
        operand: .quad 0x0102030405060708
    """
    assert run(assemble(source), device).outcome == Exited(code=1)
    assert device.seen == [("write", 0x18, 8, 0x0102030405060708)]


def test_a_read_modify_write_is_a_read_and_a_write(assemble: Callable[[str], Path]) -> None:
    device = Recorder()
    run(assemble("orl $0xff000000, 0xe0000020; debug_exit 0"), device)
    assert device.seen == [("read", 0x20, 4, 0), ("write", 0x20, 4, 0xFF332211)]


def test_a_string_write_comes_in_order(assemble: Callable[[str], Path]) -> None:
    device = Recorder()
    source = """
        mov $words, %esi; mov $3, %ecx; mov $0x700, %dx; cld; rep outsw
        debug_exit 0
        words: .word 0x1111, 0x2222, 0x3333
    """
    run(assemble(source), device)
    assert device.seen == [("write", 0, 2, 0x1111), ("write", 0, 2, 0x2222), ("write", 0, 2, 0x3333)]


def test_a_string_read_asks_the_device_for_each_item(assemble: Callable[[str], Path]) -> None:
    device = Recorder()
    source = f"""
        mov ${SCRATCH}, %edi; mov $3, %ecx; mov $0x701, %dx; cld; rep insw
        print {SCRATCH}, 8
        debug_exit 0
    """
    report = run(assemble(source), device)
    assert device.seen == [("read", 1, 2, 0)] * 3
    assert report.console == b"\x11\x22\x11\x22\x11\x22\0\0"


def test_an_access_beside_the_device_does_not_reach_it(assemble: Callable[[str], Path]) -> None:
    device = Recorder()
    source = "outb 1, 0x6ff; outb 1, 0x704; mov 0xdfffffff, %al; mov 0xe0001000, %al; debug_exit 0"
    assert run(assemble(source), device).outcome == Exited(code=1)
    assert device.seen == []


@pytest.mark.usefixtures("mappings")
@pytest.mark.parametrize("access", ["mov 0xe0000000, %eax", "mov %eax, 0xe0000000", "mov $0x700, %dx; in %dx, %al"])
def test_a_device_s_exception_ends_the_machine_with_it(assemble: Callable[[str], Path], access: str) -> None:
    device = Broken()
    outcome = run(assemble(f"{access}; debug_exit 0"), device).outcome
    assert isinstance(outcome, VmmError)
    assert outcome.error is device.error
