"""A VM's file descriptor: memory slots, interrupt chips, irqfd and ioeventfd, vCPUs."""

from __future__ import annotations

import mmap
import os

from kvmlite._native import ffi, lib
from kvmlite.abi import kvm_ioctls as ioctls
from kvmlite.abi.kvm import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQCHIP_IOAPIC,
    KVM_PIT_SPEAKER_DUMMY,
)
from kvmlite.kvm.ioctl import ioctl
from kvmlite.kvm.vcpu import Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_IOAPIC_PINS = 24


class Vm:
    """One virtual machine as KVM knows it.

    Thread: any, before its vCPUs run; the irqfd and ioeventfd calls at any time. Owns its file descriptor.
    """

    def __init__(self, fd: int, *, run_size: int) -> None:
        self.fd = fd
        self._run_size = run_size

    def close(self) -> None:
        """Close the file descriptor. KVM frees the VM when its vCPUs are closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_extension(self, capability: int) -> int:
        """KVM API, KVM_CHECK_EXTENSION on the VM."""
        return ioctl(self.fd, ioctls.KVM_CHECK_EXTENSION, capability, f"KVM_CHECK_EXTENSION({capability})")

    def set_memory_slot(self, slot: int, gpa: int, size: int, hva: int, *, flags: int = 0) -> None:
        """Map host memory into the guest; ``size`` 0 removes the slot (bytes, multiples of 4096).

        Spec: KVM API, KVM_SET_USER_MEMORY_REGION.
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot, region.flags, region.guest_phys_addr = slot, flags, gpa
        region.memory_size, region.userspace_addr = size, hva
        call = f"KVM_SET_USER_MEMORY_REGION(slot={slot}, gpa={gpa:#x}, size={size:#x})"
        ioctl(self.fd, ioctls.KVM_SET_USER_MEMORY_REGION, region, call)

    def set_tss_addr(self, gpa: int) -> None:
        """Give Intel hosts three pages for the real-mode TSS. Spec: KVM API, KVM_SET_TSS_ADDR."""
        ioctl(self.fd, ioctls.KVM_SET_TSS_ADDR, gpa, f"KVM_SET_TSS_ADDR({gpa:#x})")

    def set_identity_map_addr(self, gpa: int) -> None:
        """Give Intel hosts one page for the identity map. Spec: KVM API, KVM_SET_IDENTITY_MAP_ADDR."""
        address = ffi.new("uint64_t *", gpa)
        call = f"KVM_SET_IDENTITY_MAP_ADDR({gpa:#x})"
        ioctl(self.fd, ioctls.KVM_SET_IDENTITY_MAP_ADDR, address, call)

    def create_irqchip(self) -> None:
        """Put PIC, IOAPIC and LAPICs into the kernel. Before the first vCPU. Spec: KVM API, KVM_CREATE_IRQCHIP."""
        ioctl(self.fd, ioctls.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """Put an 8254 timer into the kernel, its speaker port included. After the interrupt chips.

        Spec: KVM API, KVM_CREATE_PIT2.
        """
        config = ffi.new("struct kvm_pit_config *", {"flags": KVM_PIT_SPEAKER_DUMMY})
        ioctl(self.fd, ioctls.KVM_CREATE_PIT2, config, "KVM_CREATE_PIT2")

    def set_ioapic_routing(self, msi: Mapping[int, tuple[int, int]] | None = None) -> None:
        """Route each GSI below 24 to the IOAPIC pin of the same number and no PIC, all in one call.

        Args:
            msi: Further GSIs (24 and up) as ``gsi -> (address, data)``.

        Spec: KVM API, KVM_SET_GSI_ROUTING.
        """
        extra = dict(msi or {})
        count = _IOAPIC_PINS + len(extra)
        routing = ffi.new("struct kvm_irq_routing *", {"entries": count})
        routing.nr = count
        for pin in range(_IOAPIC_PINS):
            lib.kvl_route_irqchip(ffi.addressof(routing.entries, pin), pin, KVM_IRQCHIP_IOAPIC, pin)
        for position, (gsi, (address, data)) in enumerate(extra.items(), start=_IOAPIC_PINS):
            lib.kvl_route_msi(ffi.addressof(routing.entries, position), gsi, address, data)
        ioctl(self.fd, ioctls.KVM_SET_GSI_ROUTING, routing, f"KVM_SET_GSI_ROUTING(nr={count})")

    def set_irq_line(self, gsi: int, level: int) -> None:
        """Drive an interrupt line. Spec: KVM API, KVM_IRQ_LINE."""
        line = ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level})
        ioctl(self.fd, ioctls.KVM_IRQ_LINE, line, f"KVM_IRQ_LINE(gsi={gsi}, level={level})")

    def add_irqfd(self, eventfd: int, gsi: int, *, flags: int = 0) -> None:
        """Make a write to ``eventfd`` raise ``gsi`` (an edge). The eventfd stays the caller's.

        Spec: KVM API, KVM_IRQFD.
        """
        irqfd = ffi.new("struct kvm_irqfd *", {"fd": eventfd, "gsi": gsi, "flags": flags})
        ioctl(self.fd, ioctls.KVM_IRQFD, irqfd, f"KVM_IRQFD(fd={eventfd}, gsi={gsi})")

    def add_ioeventfd(
        self, eventfd: int, address: int, size: int, *, datamatch: int | None = None, port: bool = False, flags: int = 0
    ) -> None:
        """Make a guest write at ``address`` signal ``eventfd`` instead of leaving KVM_RUN.

        Args:
            size: Width of the write in bytes: 1, 2, 4 or 8 (0 for any, without datamatch).
            datamatch: Only writes of this value; any if None.
            port: An I/O port rather than a guest-physical address.

        Spec: KVM API, KVM_IOEVENTFD.
        """
        flags |= KVM_IOEVENTFD_FLAG_PIO if port else 0
        flags |= KVM_IOEVENTFD_FLAG_DATAMATCH if datamatch is not None else 0
        fields = {"datamatch": datamatch or 0, "addr": address, "len": size, "fd": eventfd, "flags": flags}
        ioeventfd = ffi.new("struct kvm_ioeventfd *", fields)
        call = f"KVM_IOEVENTFD(fd={eventfd}, address={address:#x}, size={size})"
        ioctl(self.fd, ioctls.KVM_IOEVENTFD, ioeventfd, call)

    def coalesce_mmio(self, gpa: int, size: int) -> None:
        """Have KVM note writes to these addresses in the VM's ring instead of leaving KVM_RUN, until the ring is full.

        Spec: KVM API, KVM_REGISTER_COALESCED_MMIO.
        """
        zone = ffi.new("struct kvm_coalesced_mmio_zone *", {"addr": gpa, "size": size})
        call = f"KVM_REGISTER_COALESCED_MMIO({gpa:#x}, {size})"
        ioctl(self.fd, ioctls.KVM_REGISTER_COALESCED_MMIO, zone, call)

    def create_vcpu(self, vcpu_id: int, bus: Any) -> Vcpu:
        """Make a vCPU.

        Args:
            bus: ``struct kvl_bus *``: which exits belong to whom; must outlive the vCPU.

        Spec: KVM API, KVM_CREATE_VCPU.
        """
        fd = ioctl(self.fd, ioctls.KVM_CREATE_VCPU, vcpu_id, f"KVM_CREATE_VCPU(vcpu_id={vcpu_id})")
        try:
            shared = mmap.mmap(fd, self._run_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            return Vcpu(fd, vcpu_id, shared, bus)  # the mapping ends with its last reference
        except BaseException:
            os.close(fd)
            raise
