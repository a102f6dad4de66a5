"""The parts a machine is made of, for programs that wire their own. Documented, but may change in any version.

    with Kvm() as kvm:
        vm = kvm.create_vm()

* KVM: ``Kvm``, ``Vm``, ``Vcpu``, ``PreparedVm``, ``init_kick_signal``, ``enter_long64``, ``enter_protected32``, and
  ``ring0_speed``, which tells a processor's KVM from a software one
* memory and buses: ``GuestMemory``, ``MemoryRegion``, ``GuestMemoryError``, ``Bus``
* booting: ``open_kernel``, ``KernelImage``, ``load_kernel``, ``EntryState``
* devices: ``Virtqueue``, ``DescriptorChain``, ``QueueLayout``, ``MmioTransport``, ``DeviceResources``,
  ``read_config_bytes``, ``GuestFault``; they run on a ``DeviceLoop`` and are kicked through an ``EventFd``

Names are imported when they are first used, as in ``kvmlite``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.boot import EntryState, KernelImage, load_kernel, open_kernel
    from kvmlite.bus import Bus
    from kvmlite.errors import GuestFault
    from kvmlite.host.eventfd import EventFd
    from kvmlite.host.loop import DeviceLoop
    from kvmlite.kvm.prepared import PreparedVm
    from kvmlite.kvm.probe import ring0_speed
    from kvmlite.kvm.system import Kvm
    from kvmlite.kvm.vcpu import Vcpu, init_kick_signal
    from kvmlite.kvm.vm import Vm
    from kvmlite.kvm.x86 import enter_long64, enter_protected32
    from kvmlite.memory.guest_memory import GuestMemory, GuestMemoryError, MemoryRegion
    from kvmlite.virtio.device import DeviceResources, read_config_bytes
    from kvmlite.virtio.mmio import MmioTransport
    from kvmlite.virtio.queue import DescriptorChain, QueueLayout, Virtqueue

_HOMES = {
    "kvmlite.boot": ("EntryState", "KernelImage", "load_kernel", "open_kernel"),
    "kvmlite.bus": ("Bus",),
    "kvmlite.errors": ("GuestFault",),
    "kvmlite.host.eventfd": ("EventFd",),
    "kvmlite.host.loop": ("DeviceLoop",),
    "kvmlite.kvm.prepared": ("PreparedVm",),
    "kvmlite.kvm.probe": ("ring0_speed",),
    "kvmlite.kvm.system": ("Kvm",),
    "kvmlite.kvm.vcpu": ("Vcpu", "init_kick_signal"),
    "kvmlite.kvm.vm": ("Vm",),
    "kvmlite.kvm.x86": ("enter_long64", "enter_protected32"),
    "kvmlite.memory.guest_memory": ("GuestMemory", "GuestMemoryError", "MemoryRegion"),
    "kvmlite.virtio.device": ("DeviceResources", "read_config_bytes"),
    "kvmlite.virtio.mmio": ("MmioTransport",),
    "kvmlite.virtio.queue": ("DescriptorChain", "QueueLayout", "Virtqueue"),
}

__all__ = [
    "Bus", "DescriptorChain", "DeviceLoop", "DeviceResources", "EntryState", "EventFd", "GuestFault", "GuestMemory",
    "GuestMemoryError", "KernelImage", "Kvm", "MemoryRegion", "MmioTransport", "PreparedVm", "QueueLayout", "Vcpu",
    "Virtqueue", "Vm", "enter_long64", "enter_protected32", "init_kick_signal", "load_kernel", "open_kernel",
    "read_config_bytes", "ring0_speed",
]  # fmt: skip


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            import importlib

            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'kvmlite.lowlevel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
