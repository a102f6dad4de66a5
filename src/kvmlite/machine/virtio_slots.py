"""Each virtio device gets its slot: an MMIO window, an interrupt line, and a kick eventfd per queue."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.abi.kvm import KVM_CAP_COALESCED_MMIO, KVM_CAP_READONLY_MEM
from kvmlite.abi.virtio_mmio import MmioRegister
from kvmlite.errors import ConfigError
from kvmlite.host.eventfd import EventFd
from kvmlite.machine.memory_slots import MemorySlots
from kvmlite.machine.register_pages import RegisterPages
from kvmlite.virtio.ack_ring import AckRing
from kvmlite.virtio.device import DeviceResources
from kvmlite.virtio.interrupt import InterruptLine
from kvmlite.virtio.mmio import MmioTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.host.loop import DeviceLoop
    from kvmlite.kvm.vm import Vm
    from kvmlite.machine.builder import MachineEvents, Parts
    from kvmlite.machine.config import DeviceSpec


class VirtioSlots:
    """The slots of one machine.

    Made with its RAM: a memory slot that is added after something on KVM's buses (interrupt chips, an ioeventfd) may wait
    for a grace period of the kernel.

    Args:
        specs: What goes into the slots, in order.
        parts: Owns what is made.
        vm: Has its RAM, and no vCPU.

    Raises:
        ConfigError: There are more devices than slots.
    """

    def __init__(self, specs: Sequence[DeviceSpec], parts: Parts, vm: Vm) -> None:
        if len(specs) > layout.VIRTIO_MMIO_MAX_DEVICES:
            raise ConfigError(f"{len(specs)} devices asked for; a machine has {layout.VIRTIO_MMIO_MAX_DEVICES} slots")
        self._specs = specs
        self._parts = parts
        self._vm = vm
        self._memory_slots = MemorySlots(vm, parts.memory)
        self._windows = [layout.virtio_mmio_window(index) for index in range(len(specs))]
        self._pages: RegisterPages = parts.own(RegisterPages(self._windows), is_lent=True)
        if vm.check_extension(KVM_CAP_READONLY_MEM):
            self._pages.map(self._memory_slots)

    def add_devices(self, loop: DeviceLoop, events: MachineEvents) -> None:
        """Make the devices and put them on the bus."""
        ack_page = self._vm.check_extension(KVM_CAP_COALESCED_MMIO)
        if ack_page:
            self._parts.ack_ring = self._parts.own(AckRing(self._vm, ack_page), is_lent=True)
        for index, spec in enumerate(self._specs):
            self._add_device(index, spec, loop, events)

    def _add_device(self, index: int, spec: DeviceSpec, loop: DeviceLoop, events: MachineEvents) -> None:
        parts, vm, window = self._parts, self._vm, self._windows[index]
        name = f"{type(spec).__name__.lower()}{index}"
        resources = DeviceResources(
            memory=parts.memory,
            loop=loop,
            name=name,
            warn=events.on_warning,
            on_error=events.on_device_error,
            map_memory=self._memory_slots.add,
        )
        irq: EventFd = parts.own(EventFd(), is_lent=True)  # closed after the device: whoever serves it signals it
        device = parts.own(spec.attach(resources))
        kicks = []
        for queue in range(len(device.queue_sizes)):
            kick: EventFd = parts.own(EventFd(), is_lent=True)
            vm.add_ioeventfd(kick.fd, window.gpa + MmioRegister.QUEUE_NOTIFY, 4, datamatch=queue)
            kicks.append(kick.fd)
        transport = parts.own(
            MmioTransport(
                device,
                parts.memory,
                loop,
                interrupt_eventfd=irq.fd,
                kick_eventfds=tuple(kicks),
                on_error=events.on_device_error,
                line=InterruptLine(vm, window.gsi),
                registers=self._pages.registers(index),
            )
        )
        interrupt = transport.state.interrupt
        if parts.ack_ring is not None:
            parts.ack_ring.add(interrupt, window.gpa + MmioRegister.INTERRUPT_ACK)
        parts.bus.claim_mmio(window.gpa, window.size, transport, name, irq=interrupt.native)
        parts.devices[name] = device
