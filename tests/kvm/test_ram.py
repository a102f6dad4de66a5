"""Guest RAM as the guest sees it: each backing, above the 32-bit hole, and where it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from support.machines import built, enter_ring3, ram, run_to_end, vcpus
from support.requirements import lack

from kvmlite.errors import HostError
from kvmlite.kvm.x86 import enter_long64
from kvmlite.machine.outcome import Exited

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("mappings")]

Assemble = Callable[[str], Path]
POOL = Path("/proc/sys/vm/nr_hugepages")

# Adds up the 32-bit words that the host left at 3 MiB and 15 MiB, and leaves the sum at 8 MiB.
ADD = "mov 0x300000, %eax; add 0xf00000, %eax; mov %eax, 0x800000; print 0x800000, 4; debug_exit 0"


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """A pool of sixteen 2 MiB pages, put back afterwards."""
    with the_pool():
        try:
            before = POOL.read_text()
            POOL.write_text("16")
        except OSError as error:  # not root, a read-only /proc of a container, a kernel without them
            lack("hugepages", f"vm.nr_hugepages cannot be set: {error.strerror}")
        try:
            if (pages := int(POOL.read_text())) < 16:
                lack("hugepages", f"the host gives only {pages} huge pages of 16")
            yield
        finally:
            POOL.write_text(before)


@contextmanager
def the_pool() -> Iterator[None]:
    """Keep other runs of these tests from changing the pool: it is the host's."""
    with POOL.open() as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)
        yield


def add_in_guest(kernel: Path, backing: str) -> bytes:
    with built(kernel, memory_backing=backing) as machine:
        ram(machine).write(0x300000, (0x11111111).to_bytes(4, "little"))
        ram(machine).write(0xF00000, (0x12345678).to_bytes(4, "little"))
        machine.start()
        return machine.wait(30).console


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_host_and_guest_see_the_same_ram(assemble: Assemble, backing: str) -> None:
    assert add_in_guest(assemble(ADD), backing) == (0x23456789).to_bytes(4, "little")


@pytest.mark.usefixtures("huge_pages")
def test_host_and_guest_see_the_same_ram_in_huge_pages(assemble: Assemble) -> None:
    assert add_in_guest(assemble(ADD), "hugepages") == (0x23456789).to_bytes(4, "little")


def test_a_pool_without_huge_pages_says_how_many_are_needed(assemble: Assemble) -> None:
    kernel = assemble("debug_exit 0")
    with the_pool() if POOL.exists() else nullcontext():
        if POOL.exists() and int(POOL.read_text()) > 0:
            pytest.skip("the host has a pool of huge pages")
        with pytest.raises(HostError, match="cannot map 16 MiB of guest memory") as caught:
            run_to_end(kernel, memory_backing="hugepages")
    assert "sysctl vm.nr_hugepages=8" in caught.value.hint


def test_ram_ends_where_it_was_said_to(assemble: Assemble) -> None:
    source = """
        movl $0x5a5a5a5a, 0xfffffc
        movl $0x5a5a5a5a, 0x1000000
        mov 0xfffffc, %eax
        mov %eax, 0x9000
        mov 0x1000000, %eax
        mov %eax, 0x9004
        print 0x9000, 8
        debug_exit 0
    """
    report = run_to_end(assemble(source), memory_mib=16)
    assert report.console == b"\x5a" * 4 + b"\xff" * 4
    assert report.statistics.exits_by_reason["KVM_EXIT_MMIO"] == 2


def test_ram_above_3_gib_goes_on_at_4_gib(assemble: Assemble) -> None:
    """3.5 GiB, of which only the touched pages cost anything."""
    source = (
        "mov 0xbffffffc, %eax; mov %eax, 0x9000; mov 0xc0000000, %eax; mov %eax, 0x9004; print 0x9000, 8; debug_exit 0"
    )
    with built(assemble(source), memory_mib=3584) as machine:
        memory = ram(machine)
        assert [(r.gpa, r.size) for r in memory.regions] == [(0, 0xC0000000), (0x100000000, 0x20000000)]
        memory.write(0xBFFFFFFC, b"last")
        memory.write(0x100000000, b"high")
        memory.write(0x11FFFFFFC, b"end.")
        machine.start()
        assert machine.wait(30).console == b"last" + b"\xff" * 4


@pytest.mark.parametrize("ring", [0, 3])
def test_a_64_bit_guest_reaches_ram_above_4_gib(assemble: Assemble, ring: int) -> None:
    source = """
    .code64
        movabs $0x100000000, %rbx
        mov (%rbx), %eax
        add $1, %eax
        mov %eax, 0x1ffffffc(%rbx)
        mov $0xf4, %dx
        mov $5, %al
        out %al, %dx
    1:  jmp 1b
    """
    pml4, pdpt = 0x10000, 0x11000
    flags = 0x07  # present, writable, user
    with built(assemble(source), memory_mib=3584) as machine:
        memory, vcpu = ram(machine), vcpus(machine)[0]
        memory.write(0x100000000, (41).to_bytes(4, "little"))
        memory.write(pml4, (pdpt | flags).to_bytes(8, "little"))
        for gib in range(5):  # identity map in 1 GiB pages
            directory = 0x12000 + gib * 0x1000
            memory.write(pdpt + 8 * gib, (directory | flags).to_bytes(8, "little"))
            pages = b"".join(((gib << 30) + (n << 21) | flags | 0x80).to_bytes(8, "little") for n in range(512))
            memory.write(directory, pages)
        enter_long64(vcpu, gdt=0x500, gdt_size=32, page_table=pml4)
        if ring == 3:
            enter_ring3(vcpu)
        machine.start()
        assert machine.wait_ended(30)
        assert memory.read(0x11FFFFFFC, 4) == (42).to_bytes(4, "little")
        assert machine.wait(30).outcome == Exited(code=11)
