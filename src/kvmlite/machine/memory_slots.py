"""Memory slots of devices: what is mapped into the guest beside its RAM."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.abi.kvm import KVM_MEM_READONLY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.kvm.vm import Vm
    from kvmlite.memory.guest_memory import GuestMemory

_ALIGN = layout.GIB  # as apart as the guest's own sections and largest pages


class MemorySlots:
    """Gives out slot numbers and guest-physical addresses after those of RAM.

    A slot stays until the VM is closed: by then no vCPU runs.

    Thread: the one that builds the machine.
    """

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        self._vm = vm
        self._slot = len(memory.regions)
        last = memory.regions[-1]
        self._gpa = max(layout.HOLE_END, _align(last.gpa + last.size))

    def add(self, hva: int, size: int, *, read_only: bool) -> int:
        """See :class:`kvmlite.virtio.device.MapMemory`."""
        gpa = self._gpa
        self.add_at(gpa, hva, size, read_only=read_only)
        self._gpa = _align(gpa + size)
        return gpa

    def add_at(self, gpa: int, hva: int, size: int, *, read_only: bool) -> None:
        """Map memory at an address of the caller's choice; all in bytes, multiples of 4096.

        Raises:
            KvmError: KVM refuses.
        """
        self._vm.set_memory_slot(self._slot, gpa, size, hva, flags=KVM_MEM_READONLY if read_only else 0)
        self._slot += 1


def _align(gpa: int) -> int:
    return (gpa + _ALIGN - 1) // _ALIGN * _ALIGN
