"""Many machines in one process: at once, from different threads, and one after another without a trace."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.leaks import machine_mappings, open_descriptors
from support.machines import bare_config, run_to_end

from kvmlite.errors import StateError
from kvmlite.machine import Machine
from kvmlite.machine.outcome import Exited, Stopped

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("mappings")]

Assemble = Callable[[str], Path]
CYCLES = 100


def mapped_kib() -> int:
    """Size of this process's address space."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmSize:")).split()[1])


def fill_arenas() -> None:
    """Make the C library map as many heaps as it ever will: one for each thread of as many as there may be at once."""
    threads_at_once = 8 * (os.cpu_count() or 1) + 8
    barrier = threading.Barrier(threads_at_once)
    threads = [threading.Thread(target=barrier.wait, args=(60,)) for _ in range(threads_at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.timeout(300)
def test_100_machines_one_after_another_leave_no_trace(assemble: Assemble) -> None:
    kernel = assemble('print message, 2; debug_exit 0; message: .ascii "ok"')
    fill_arenas()
    for _ in range(5):  # let the allocators and the thread-stack cache settle
        run_to_end(kernel)
    gc.collect()
    descriptors, mappings, size = open_descriptors(), machine_mappings(), mapped_kib()
    for _ in range(CYCLES):
        report = run_to_end(kernel)
        assert report.outcome == Exited(code=1)
        assert report.console == b"ok"
    gc.collect()
    give_up = time.monotonic() + 30
    while not (
        open_descriptors() == descriptors
        and machine_mappings() == mappings
        and mapped_kib() - size < 16 << 10  # one machine's RAM
    ):  # a thread that has said goodbye still has its stack for a moment
        assert time.monotonic() < give_up, (open_descriptors() ^ descriptors, mapped_kib() - size)
        time.sleep(0.01)


@pytest.mark.timeout(300)
def test_50_machines_stopped_at_any_moment_leave_no_trace(assemble: Assemble) -> None:
    kernel = assemble("1: jmp 1b")
    for number in range(50):
        with Machine(bare_config(kernel, vcpu_count=1 + number % 2)) as machine:
            stopper = threading.Timer(0.0005 * number, machine.close)
            stopper.start()
            try:
                machine.start()
            except StateError:  # closed before it started
                continue
            finally:
                stopper.join()
            assert machine.wait(30).outcome == Stopped()


def test_four_threads_run_machines_at_once(assemble: Assemble) -> None:
    kernels = [assemble(f"mov $20000, %ecx; 1: loop 1b; debug_exit {value}") for value in range(4)]
    found: list[tuple[int, list[object]]] = []

    def run(number: int) -> None:
        found.append((number, [run_to_end(kernels[number]).outcome for _ in range(4)]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(number, [Exited(code=2 * number + 1)] * 4) for number in range(4)]


def test_machines_started_here_are_stopped_there(assemble: Assemble) -> None:
    kernel = assemble("1: jmp 1b")
    machines = [Machine(bare_config(kernel)) for _ in range(4)]
    for machine in machines:
        machine.start()
    assert {machine.state for machine in machines} == {"running"}
    threads = [threading.Thread(target=machine.close) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {machine.state for machine in machines} == {"stopped"}


def test_the_end_of_one_machine_does_not_touch_another(assemble: Assemble) -> None:
    with Machine(bare_config(assemble("1: jmp 1b"))) as survivor:
        survivor.start()
        for _ in range(5):
            assert run_to_end(assemble("lidt kvl_empty_idtr; mov $0xff00, %ax; mov %ax, %ds")).exit_code is None
        assert survivor.state == "running"
        assert not survivor.has_ended()


def test_a_machine_s_descriptors_are_not_inherited(assemble: Assemble) -> None:
    before = {fd for fd, _ in open_descriptors()}
    with Machine(bare_config(assemble("1: jmp 1b"), memory_backing="memfd", agent_serial=True)) as machine:
        machine.start()
        fds = {fd for fd, _ in open_descriptors()} - before
        assert len(fds) > 8
        assert [fd for fd in fds if os.get_inheritable(fd)] == []
