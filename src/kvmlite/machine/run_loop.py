"""The thread of one vCPU: KVM_RUN in C, the exits C does not own here.

run ──> exit ──> Python acts (bus access, machine ends) ──> paused? parked until resumed ──> run
"""

from __future__ import annotations

import _thread
from errno import EFAULT

from kvmlite._native import ffi, lib
from kvmlite.abi import kvm
from kvmlite.abi.x86 import RFLAGS_IF
from kvmlite.errors import HostError, KvmError, KvmliteError
from kvmlite.machine.lifecycle import Latch
from kvmlite.machine.outcome import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmlite.bus import Bus
    from kvmlite.kvm.vcpu import Vcpu
    from kvmlite.machine.outcome import Outcome

JOIN_TIMEOUT_S = 10.0


class VcpuStopError(KvmliteError):
    """KVM cannot run the guest on: an exit that has no meaning for kvmlite."""


class VcpuSnapshot:
    """What a vCPU was doing when it was looked at."""

    __slots__ = ("interrupts_enabled", "mp_state", "rip")

    def __init__(self, mp_state: int, rip: int, interrupts_enabled: bool) -> None:
        self.mp_state, self.rip, self.interrupts_enabled = mp_state, rip, interrupts_enabled

    @property
    def is_dead(self) -> bool:
        """It can never run again: halted with interrupts off, or never started."""
        halted = self.mp_state == kvm.KVM_MP_STATE_HALTED and not self.interrupts_enabled
        return halted or self.mp_state == kvm.KVM_MP_STATE_UNINITIALIZED


class VcpuThread:
    """Runs one vCPU.

    Args:
        on_end: Told an outcome when the guest ended here; the machine keeps the first.
        on_shutdown: Told the vCPU's number after a triple fault; the machine decides what it was.

    Thread: ``start``, ``request_*`` and ``join`` belong to the machine; the rest runs on the vCPU's thread.
    """

    def __init__(
        self, vcpu: Vcpu, bus: Bus, *, on_end: Callable[[Outcome], None], on_shutdown: Callable[[int], None]
    ) -> None:
        self.vcpu = vcpu
        self._bus = bus
        self._on_end = on_end
        self._on_shutdown = on_shutdown
        self._stopping = False
        self._resumed: Latch | None = None
        self._parked: Latch | None = None
        self._inspection: tuple[Latch, list[VcpuSnapshot]] | None = None
        self._finished = Latch()
        self.thread_id = 0

    def start(self) -> None:
        """Start the thread."""
        self.thread_id = _thread.start_new_thread(self._main, ())

    def request_stop(self) -> None:
        """Make the thread end soon; ``join`` waits for it."""
        self._stopping = True
        resumed = self._resumed  # once: another thread may resume it meanwhile
        if resumed is not None:
            resumed.set()
        self.vcpu.kick()

    def request_pause(self) -> Latch:
        """Make it park; the latch is set when it has, or when its thread has ended."""
        self._parked = parked = Latch()
        self._resumed = Latch()
        self.vcpu.kick()
        if self._finished.is_set:
            parked.set()
        return parked

    def resume(self) -> None:
        """Let a parked thread go on."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            resumed.set()

    def join(self) -> bool:
        """Wait for the thread's end; False if it does not come, or if the caller is that thread."""
        if not self.thread_id or self._finished.is_set:  # the system gives an ended thread's number to a new one
            return True
        return _thread.get_ident() != self.thread_id and self._finished.wait(JOIN_TIMEOUT_S)

    def inspect(self, timeout_s: float = 1.0) -> VcpuSnapshot | None:
        """Look at the vCPU while it runs; None if it has ended or did not answer in time. Any thread but its own."""
        if self._finished.is_set:
            return None
        done, found = Latch(), list[VcpuSnapshot]()
        self._inspection = (done, found)
        self.vcpu.kick()
        done.wait(timeout_s)
        return found[0] if found else None

    def _main(self) -> None:
        lib.kvl_thread_set_name(f"vcpu-{self.vcpu.vcpu_id}".encode())
        try:
            self._run()
        except BaseException as error:  # a thread's top: the machine ends, wait() reports it
            self._on_end(VmmError(error=error))
        finally:
            self._finished.set()  # first: request_pause looks at it after it has left a latch
            if self._parked is not None:
                self._parked.set()

    def _run(self) -> None:
        run = self.vcpu.run
        while not self._stopping:
            self._handle(run())
            if self._inspection is not None:
                self._answer_inspection()
            resumed = self._resumed
            if resumed is not None and not self._stopping:
                assert self._parked is not None
                self._parked.set()
                resumed.wait()

    def _handle(self, exit_info: Any) -> None:
        match exit_info.reason:
            case kvm.KVM_EXIT_IO:
                self._handle_port(exit_info)
            case kvm.KVM_EXIT_MMIO:
                self._handle_mmio(exit_info)
            case kvm.KVM_EXIT_INTR:
                pass
            case kvm.KVM_EXIT_SHUTDOWN:
                self._stopping = True
                self._on_shutdown(self.vcpu.vcpu_id)
            case kvm.KVM_EXIT_SYSTEM_EVENT if exit_info.address == kvm.KVM_SYSTEM_EVENT_RESET:
                self._stopping = True
                self._on_shutdown(self.vcpu.vcpu_id)
            case kvm.KVM_EXIT_HLT:  # only without an interrupt chip in KVM
                self._stopping = True
                from kvmlite.machine.outcome import Hung

                self._on_end(Hung(detail=f"vCPU {self.vcpu.vcpu_id} halted"))
            case _:
                self._stopping = True
                self._on_end(VmmError(error=self._unknown_exit(exit_info)))

    def _handle_port(self, exit_info: Any) -> None:
        entry = self._bus.find_port(exit_info.address)
        assert entry is not None, "C passes up claimed ports only"
        offset, size = exit_info.address - entry.base, exit_info.size
        for item in range(exit_info.count):
            view = ffi.buffer(exit_info.data + item * size, size)
            if exit_info.is_write:
                entry.device.write(offset, size, int.from_bytes(view[:], "little"))
            else:
                view[:] = _as_bytes(entry.device.read(offset, size), size)

    def _handle_mmio(self, exit_info: Any) -> None:
        entry = self._bus.find_mmio(exit_info.address)
        assert entry is not None, "C passes up claimed addresses only"
        offset, size = exit_info.address - entry.base, exit_info.size
        view = ffi.buffer(exit_info.data, size)
        if exit_info.is_write:
            entry.device.write(offset, size, int.from_bytes(view[:], "little"))
        else:
            view[:] = _as_bytes(entry.device.read(offset, size), size)

    def _answer_inspection(self) -> None:
        assert self._inspection is not None
        (done, found), self._inspection = self._inspection, None
        try:
            regs = self.vcpu.get_regs()
            found.append(VcpuSnapshot(self.vcpu.get_mp_state(), regs.rip, bool(regs.rflags & RFLAGS_IF)))
        finally:
            done.set()

    def _unknown_exit(self, exit_info: Any) -> KvmliteError:
        vcpu = self.vcpu
        if exit_info.error == EFAULT:
            return HostError(
                f"vCPU {vcpu.vcpu_id} at rip {vcpu.get_regs().rip:#x}: the host cannot give the guest a page of its memory",
                EFAULT,
                hint="a file mapped into the guest was cut short or cannot be read, or the host has no (huge) page left",
            )
        if exit_info.error:
            return KvmError(f"vCPU {vcpu.vcpu_id}: KVM_RUN", exit_info.error)
        where = f"vCPU {vcpu.vcpu_id} at rip {vcpu.get_regs().rip:#x}"
        name = kvm.exit_reason_name(exit_info.reason)
        detail = f"{where}: {name}, {exit_info.address:#x}"
        if exit_info.reason == kvm.KVM_EXIT_INTERNAL_ERROR:
            return VcpuStopError(
                f"{detail}: KVM could not emulate an instruction",
                hint="on a software KVM this is expected of real kernels: run kvmlite doctor",
            )
        if exit_info.reason == kvm.KVM_EXIT_FAIL_ENTRY:
            return VcpuStopError(f"{detail}: the processor refused the guest's state", hint="run kvmlite doctor")
        return VcpuStopError(detail)


def _as_bytes(value: int, size: int) -> bytes:
    return (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
