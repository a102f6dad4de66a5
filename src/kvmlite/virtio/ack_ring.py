"""Interrupt acknowledgements that KVM notes in a ring of its own instead of leaving the guest (ADR 9)."""

from __future__ import annotations

import mmap

from kvmlite._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.kvm.vm import Vm
    from kvmlite.virtio.interrupt import DeviceInterrupt


class AckRing:
    """The ring of a VM, and the devices whose acknowledgements go there.

    Args:
        vm: The VM.
        page: Where the ring is in a vCPU's shared memory, in pages: the answer for KVM_CAP_COALESCED_MMIO, not 0.

    Thread: the one that builds the machine.
    """

    def __init__(self, vm: Vm, page: int) -> None:
        self._vm = vm
        self._offset = page * mmap.PAGESIZE
        self._native = ffi.new("struct kvl_acks *")
        lib.kvl_acks_init(self._native)
        self._interrupts: list[DeviceInterrupt] = []
        self._page: mmap.mmap | None = None

    def add(self, interrupt: DeviceInterrupt, gpa: int) -> None:
        """Have KVM note what is written to the acknowledge register at ``gpa``.

        Raises:
            KvmError: KVM refuses.
        """
        if lib.kvl_acks_add(self._native, interrupt.native, gpa):
            self._interrupts.append(interrupt)  # C has its address
            self._vm.coalesce_mmio(gpa, 4)

    def map(self, vcpu_fd: int) -> None:
        """Map the ring through any vCPU, before one runs. It stays when that is closed."""
        self._page = mmap.mmap(vcpu_fd, lib.KVL_ACKS_RING_SIZE, offset=self._offset)
        self._view = ffi.from_buffer(self._page, require_writable=True)
        lib.kvl_acks_set_ring(self._native, self._view)

    def close(self) -> None:
        """Unmap it. vCPUs and devices have ended."""
        lib.kvl_acks_deinit(self._native)
        self._interrupts.clear()
        if self._page is not None:
            ffi.release(self._view)
            self._page.close()
