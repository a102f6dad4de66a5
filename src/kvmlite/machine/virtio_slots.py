"""Each virtio device gets its slot: an MMIO window, an interrupt line, and a kick eventfd per queue."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.abi.virtio_mmio import MmioRegister
from kvmlite.errors import ConfigError
from kvmlite.host.eventfd import EventFd
from kvmlite.machine.memory_slots import MemorySlots
from kvmlite.virtio.device import DeviceResources
from kvmlite.virtio.mmio import MmioTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.host.loop import DeviceLoop
    from kvmlite.kvm.vm import Vm
    from kvmlite.machine.builder import MachineEvents, Parts
    from kvmlite.machine.config import DeviceSpec
    from kvmlite.virtio.device import MapMemory


def add_virtio_devices(
    specs: Sequence[DeviceSpec], parts: Parts, vm: Vm, loop: DeviceLoop, events: MachineEvents
) -> None:
    """Make the devices and put them on the bus, in order.

    Raises:
        ConfigError: There are more than the machine has slots for.
    """
    if len(specs) > layout.VIRTIO_MMIO_MAX_DEVICES:
        raise ConfigError(f"{len(specs)} devices asked for; a machine has {layout.VIRTIO_MMIO_MAX_DEVICES} slots")
    map_memory = MemorySlots(vm, parts.memory).add
    for index, spec in enumerate(specs):
        _add_device(index, spec, parts, vm, loop, events, map_memory)


def _add_device(
    index: int,
    spec: DeviceSpec,
    parts: Parts,
    vm: Vm,
    loop: DeviceLoop,
    events: MachineEvents,
    map_memory: MapMemory,
) -> None:
    window = layout.virtio_mmio_window(index)
    name = f"{type(spec).__name__.lower()}{index}"
    resources = DeviceResources(
        memory=parts.memory,
        loop=loop,
        name=name,
        warn=events.on_warning,
        on_error=events.on_device_error,
        map_memory=map_memory,
    )
    irq: EventFd = parts.own(EventFd())  # closed after the device: its threads signal it
    vm.add_irqfd(irq.fd, window.gsi)
    device = parts.own(spec.attach(resources))
    kicks = []
    for queue in range(len(device.queue_sizes)):
        kick: EventFd = parts.own(EventFd())
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
        )
    )
    irq_registers = transport.state.interrupt.native
    parts.bus.claim_mmio(window.gpa, window.size, transport, name, irq=irq_registers)
    parts.devices[name] = device
