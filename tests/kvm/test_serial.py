"""The console port under load: nothing is lost, whoever reads it and however slowly."""

from __future__ import annotations

import fcntl
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.machines import bare_config, run_to_end

from kvmlite.machine import Machine
from kvmlite.machine.outcome import Exited, ExitReport, Stopped

pytestmark = pytest.mark.kvm

RunGuest = Callable[..., ExitReport]

# 0, 1, 2 ... 255 over and over, in string writes of 4096 bytes
STREAM = """
    mov $0x200000, %edi
    mov $4096, %ecx
    xor %eax, %eax
1:  stosb
    inc %al
    loop 1b
    mov ${chunks}, %ebx
2:  mov $0x200000, %esi
    mov $4096, %ecx
    mov $0x3f8, %dx
    cld
    rep outsb
    dec %ebx
    jnz 2b
    debug_exit 0
"""
PATTERN = bytes(range(256)) * 16


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """``(read end, write end)``; a test may close either itself."""
    ends = os.pipe2(os.O_CLOEXEC)
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:  # the test has closed it
            continue


def is_full(fd: int) -> bool:
    """Whether a write of a page to a pipe would wait."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return not poll.poll(0)


def test_a_string_write_larger_than_the_queue_loses_nothing(run_guest: RunGuest) -> None:
    report = run_guest(STREAM.format(chunks=17))  # 68 KiB through a queue of 64 KiB
    assert report.statistics.serial_bytes == 17 * 4096
    assert report.console == PATTERN * 16  # the last 64 KiB


def test_a_slow_reader_slows_the_guest_and_loses_nothing(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    read_end, write_end = pipe
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    received = bytearray()

    def read_slowly() -> None:
        while chunk := os.read(read_end, 4096):
            received.extend(chunk)
            time.sleep(0.01)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    report = run_to_end(assemble(STREAM.format(chunks=18)), console_fd=write_end)
    os.close(write_end)
    reader.join()
    assert report.outcome == Exited(code=1)
    assert bytes(received) == PATTERN * 18


def test_a_machine_whose_console_nobody_reads_can_be_stopped(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    with Machine(bare_config(assemble(STREAM.format(chunks=200)), console_fd=pipe[1])) as machine:
        machine.start()
        with pytest.raises(TimeoutError):
            machine.wait(0.2)
        machine.stop("enough")
        report = machine.wait(30)
    assert report.outcome == Stopped(detail="enough")


def test_a_console_that_nobody_reads_does_not_hold_up_the_devices(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    guest = assemble(STREAM.format(chunks=1000))
    with Machine(bare_config(guest, console_fd=pipe[1])) as machine:
        machine.start()
        while not is_full(pipe[1]):
            time.sleep(0.01)
        time.sleep(0.1)
        assert machine.loop.call(lambda: "here") == "here"
        machine.stop()


def test_waiting_with_a_limit_gives_up_on_a_reader_that_takes_nothing(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    with Machine(bare_config(assemble(STREAM.format(chunks=3)), console_fd=pipe[1])) as machine:
        machine.start()
        assert machine.wait_ended(30)
        assert select.select([pipe[0]], [], [], 30)[0]
        report = machine.wait(0.2)
    assert report.outcome == Exited(code=1)
    assert report.console == PATTERN * 3
    taken = os.read(pipe[0], 8192)
    assert 0 < len(taken) <= 4096
    assert PATTERN.startswith(taken)


def test_waiting_without_a_limit_waits_for_the_reader_until_stopped(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    with Machine(bare_config(assemble(STREAM.format(chunks=3)), console_fd=pipe[1])) as machine:
        machine.start()
        assert machine.wait_ended(30)
        reports: list[ExitReport] = []
        waiter = threading.Thread(target=lambda: reports.append(machine.wait()))
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        machine.stop()
        waiter.join(30)
        assert [report.outcome for report in reports] == [Exited(code=1)]


def test_an_agent_port_that_nobody_reads_does_not_keep_the_machine(assemble: Callable[[str], Path]) -> None:
    """The guest floods its second port; the host holds the other end and looks away."""
    source = STREAM.format(chunks=200).replace("0x3f8", "0x2f8")
    with Machine(bare_config(assemble(source), agent_serial=True)) as machine:
        machine.start()
        host_fd = machine.take_agent_serial()
        try:
            with pytest.raises(TimeoutError):
                machine.wait(0.3)
            machine.stop()
            assert machine.wait(30).outcome == Stopped()
        finally:
            os.close(host_fd)


def test_a_console_whose_reader_has_gone_stops_the_machine(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    os.close(pipe[0])
    report = run_to_end(assemble("1: outb 0x41, 0x3f8; jmp 1b"), console_fd=pipe[1])
    assert report.outcome == Stopped(detail="nobody takes the console's output any more (Broken pipe)")


def test_what_is_typed_reaches_the_guest(assemble: Callable[[str], Path], pipe: tuple[int, int]) -> None:
    source = """
        mov $5, %ebx
    1:  mov $0x3fd, %dx
        in %dx, %al
        test $1, %al
        jz 1b
        mov $0x3f8, %dx
        in %dx, %al
        xor $0x20, %al
        out %al, %dx
        dec %ebx
        jnz 1b
        debug_exit 0
    """
    os.write(pipe[1], b"HELLO")
    assert run_to_end(assemble(source), console_input_fd=pipe[0]).console == b"hello"


def test_more_input_than_the_port_holds_follows_when_there_is_room(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    source = """
        mov $6000, %ebx
        xor %ecx, %ecx
        mov $0x3fd, %dx
    1:  in %dx, %al
        test $1, %al
        jz 1b
        mov $0x3f8, %dx
        in %dx, %al
        cmp %cl, %al
        jne 2f
        inc %cl
        mov $0x3fd, %dx
        dec %ebx
        jnz 1b
        debug_exit 0
    2:  debug_exit 1
    """
    os.write(pipe[1], (bytes(range(256)) * 24)[:6000])
    assert run_to_end(assemble(source), console_input_fd=pipe[0], timeout_s=60).outcome == Exited(code=1)


def test_the_port_s_receive_interrupt_wakes_a_halted_guest(
    assemble: Callable[[str], Path], pipe: tuple[int, int]
) -> None:
    source = """
        take_interrupts 0x30, typed
        route_pin 4, 0x30
        outb 0x0b, 0x3fc        # DTR, RTS, OUT2
        outb 0x01, 0x3f9        # interrupt on received data
        outb 0x52, 0x3f8        # "R": ready
        sti
    1:  hlt
        jmp 1b
    typed:
        mov $0x3fa, %dx
        in %dx, %al
        and $0x0f, %al          # interrupt identification: 4 is received data
        mov %al, %bl
        mov $0x3f8, %dx
        in %dx, %al
        out %al, %dx
        mov %bl, %al
        debug_exit_al
    """
    with Machine(bare_config(assemble(source), console_input_fd=pipe[0])) as machine:
        machine.start()
        while machine.console_tail() != b"R":
            time.sleep(0.001)
        os.write(pipe[1], b"x")
        report = machine.wait(30)
    assert report.console == b"Rx"
    assert report.outcome == Exited(code=9)
