"""A vCPU's file descriptor: its registers, and the loop that runs it."""

from __future__ import annotations

import _thread
import os

from kvmlite._native import ffi, lib
from kvmlite.abi import kvm_ioctls as ioctls
from kvmlite.errors import HostError, KvmError
from kvmlite.kvm.ioctl import ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping
    from typing import Any


def init_kick_signal() -> None:
    """Install the no-op handler that lets a vCPU be kicked; once per process, idempotent.

    Raises:
        HostError: The embedding program handles that signal itself.
    """
    error = lib.kvl_kick_signal_init()
    if error:
        number = lib.kvl_kick_signal()
        raise HostError(
            f"signal {number}, which kvmlite uses to stop vCPUs, already has a handler",
            error,
            hint="let the program use another real-time signal",
        )


class Vcpu:
    """One virtual CPU.

    Thread: ``run`` and the register calls belong to one thread, the vCPU's own (register calls before it starts or
    while it is stopped are fine from any); ``kick`` from any. Owns its file descriptor and the ``kvm_run`` mapping.
    """

    def __init__(self, fd: int, vcpu_id: int, shared: mmap.mmap, bus: Any) -> None:
        self.fd = fd
        self.vcpu_id = vcpu_id
        self.exit = ffi.new("struct kvl_exit *")
        self._shared = shared
        self._run_view = ffi.from_buffer("struct kvm_run *", shared, require_writable=True)
        self._bus = bus
        self._native = ffi.new("struct kvl_vcpu *")
        self._kick_lock = _thread.allocate_lock()  # a kick writes to the shared page that close unmaps
        error = lib.kvl_vcpu_init(self._native, fd, self._run_view, bus)
        if error:
            raise HostError(f"vCPU {vcpu_id}: {os.strerror(error)}", error)

    def close(self) -> None:
        """Give everything back. Its thread must have left ``run``."""
        with self._kick_lock:
            if self.fd < 0:
                return
            lib.kvl_vcpu_deinit(self._native)
            ffi.release(self._run_view)
            self._shared.close()
            os.close(self.fd)
            self.fd = -1

    def run(self) -> Any:
        """Run the guest until Python has to act; returns ``struct kvl_exit *``, valid until the next call.

        Spec: KVM API, KVM_RUN. Blocks, with the GIL released.
        """
        lib.kvl_vcpu_run(self._native, self.exit)
        return self.exit

    def kick(self) -> None:
        """Make ``run`` return with KVM_EXIT_INTR: the run under way, or else the next. Any thread."""
        with self._kick_lock:
            if self.fd >= 0:
                lib.kvl_vcpu_kick(self._native)

    @property
    def stats(self) -> Any:
        """``struct kvl_vcpu_stats``: live counters, exact once the vCPU has stopped."""
        return self._native.stats

    def get_regs(self) -> Any:
        """``struct kvm_regs *``. Spec: KVM API, KVM_GET_REGS."""
        regs = ffi.new("struct kvm_regs *")
        self._ioctl(ioctls.KVM_GET_REGS, regs, "KVM_GET_REGS")
        return regs

    def set_regs(self, values: Mapping[str, int]) -> None:
        """Set the general registers; those not named become 0. Spec: KVM API, KVM_SET_REGS."""
        regs = ffi.new("struct kvm_regs *", dict(values))
        self._ioctl(ioctls.KVM_SET_REGS, regs, "KVM_SET_REGS")

    def get_sregs(self) -> Any:
        """``struct kvm_sregs *``. Spec: KVM API, KVM_GET_SREGS."""
        sregs = ffi.new("struct kvm_sregs *")
        self._ioctl(ioctls.KVM_GET_SREGS, sregs, "KVM_GET_SREGS")
        return sregs

    def set_sregs(self, sregs: Any) -> None:
        """Spec: KVM API, KVM_SET_SREGS."""
        self._ioctl(ioctls.KVM_SET_SREGS, sregs, "KVM_SET_SREGS")

    def set_cpuid(self, cpuid: Any) -> None:
        """Set what CPUID tells the guest: a ``struct kvm_cpuid2 *``. Spec: KVM API, KVM_SET_CPUID2."""
        self._ioctl(ioctls.KVM_SET_CPUID2, cpuid, f"KVM_SET_CPUID2(nent={cpuid.nent})")

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set model-specific registers.

        Raises:
            KvmError: KVM accepted only the first ones; the call names the one it refused.

        Spec: KVM API, KVM_SET_MSRS.
        """
        msrs = ffi.new("struct kvm_msrs *", {"entries": len(values)})
        msrs.nmsrs = len(values)
        for entry, (index, data) in zip(msrs.entries, values.items(), strict=False):
            entry.index, entry.data = index, data
        done = self._ioctl(ioctls.KVM_SET_MSRS, msrs, f"KVM_SET_MSRS(nmsrs={len(values)})")
        if done != len(values):
            import errno

            raise KvmError(f"KVM_SET_MSRS(index={list(values)[done]:#x})", errno.EINVAL)

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*: runnable, halted, waiting for SIPI. Spec: KVM API, KVM_GET_MP_STATE."""
        state = ffi.new("struct kvm_mp_state *")
        self._ioctl(ioctls.KVM_GET_MP_STATE, state, "KVM_GET_MP_STATE")
        return int(state.mp_state)

    def _ioctl(self, request: int, argument: Any, call: str) -> int:
        return ioctl(self.fd, request, argument, f"vCPU {self.vcpu_id}: {call}")
