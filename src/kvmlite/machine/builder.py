"""The composition root: a config becomes the parts of a machine, wired to each other. Used once, then gone."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.abi.kvm import KVM_CAP_MAX_VCPUS, KVM_CAP_TSC_DEADLINE_TIMER
from kvmlite.bus import Bus
from kvmlite.devices.power import PowerRegisters
from kvmlite.devices.serial import SerialPort
from kvmlite.errors import ConfigError, StateError
from kvmlite.host.eventfd import EventFd
from kvmlite.kvm.system import Kvm
from kvmlite.kvm.vcpu import init_kick_signal
from kvmlite.kvm.x86 import enter_long64, enter_protected32, set_topology
from kvmlite.memory.guest_memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from kvmlite.boot import EntryState
    from kvmlite.devices.serial import Reader
    from kvmlite.devices.serial_channel import SerialChannel
    from kvmlite.host.loop import DeviceLoop
    from kvmlite.host.sink import ConsoleSink
    from kvmlite.kvm.prepared import PreparedVm
    from kvmlite.kvm.vcpu import Vcpu
    from kvmlite.kvm.vm import Vm
    from kvmlite.machine.config import MachineConfig
    from kvmlite.machine.virtio_slots import VirtioSlots
    from kvmlite.virtio.ack_ring import AckRing
    from kvmlite.virtio.device import VirtioDevice

    class Closeable(Protocol):
        def close(self) -> None: ...


_KEPT: list[Closeable] = []  # what a thread of a device that does not end may still use


class Parts:
    """What a machine is made of, and how to give it back: last opened, first closed."""

    def __init__(self) -> None:
        self.memory: GuestMemory
        self.bus = Bus()
        self.vcpus: list[Vcpu] = []
        self.console: SerialPort
        self.boots_linux = False
        self.agent_channel: SerialChannel | None = None
        self.devices: dict[str, VirtioDevice] = {}
        self.ack_ring: AckRing | None = None
        self._owned: list[tuple[Closeable, bool]] = []

    def own(self, thing: Any, *, is_lent: bool = False) -> Any:
        """Close ``thing`` with the machine.

        Args:
            is_lent: Threads of devices use it.
        """
        self._owned.append((thing, is_lent))
        return thing

    def close(self) -> None:
        """Give everything back. vCPU threads and the loop have ended. The first error is raised after all is closed.

        A device whose thread the host holds (``QueueWorker.stop``) would find guest memory unmapped and its eventfd to be
        another file when it goes on: what is lent to devices stays for as long as this process.
        """
        failure: BaseException | None = None
        is_held = False
        while self._owned:
            thing, is_lent = self._owned.pop()
            if is_held and is_lent:
                _KEPT.append(thing)
                continue
            try:
                thing.close()
            except Exception as error:
                is_held = is_held or isinstance(error, StateError)
                failure = failure or error
        if failure is not None:
            raise failure


class MachineEvents:
    """What the parts tell the machine; all callable from any thread."""

    def __init__(
        self,
        *,
        on_poweroff: Callable[[], None],
        on_reset: Callable[[], None],
        on_debug_exit: Callable[[int], None],
        on_device_error: Callable[[BaseException], None],
        on_warning: Callable[[str], None],
    ) -> None:
        self.on_poweroff = on_poweroff
        self.on_reset = on_reset
        self.on_debug_exit = on_debug_exit
        self.on_device_error = on_device_error
        self.on_warning = on_warning


class Builder:
    """Builds one machine; every part is owned by ``parts`` from the moment it exists."""

    def __init__(self, config: MachineConfig, parts: Parts, loop: DeviceLoop, events: MachineEvents) -> None:
        self._config = config
        self._parts = parts
        self._loop = loop
        self._events = events
        self._vm: Vm
        self._kvm: Kvm
        self._virtio: VirtioSlots | None = None

    def build(self, console: ConsoleSink, mark: Callable[[str], None], prepared: PreparedVm | None) -> None:
        """Make and wire everything; the vCPUs are ready to run afterwards.

        Args:
            console: Takes the first serial port's output.
            mark: Notes that a named stage has been reached.
            prepared: A VM to use; taken over.
        """
        self._open_vm(prepared)
        init_kick_signal()
        self._add_serial_ports(console)
        self._add_power_registers()
        if self._virtio is not None:
            self._virtio.add_devices(self._loop, self._events)
        mark("kvm ready")
        entry = self._load_kernel()
        mark("kernel loaded")
        self._add_vcpus(entry)

    def _open_vm(self, prepared: PreparedVm | None) -> None:
        parts = self._parts
        if prepared is not None:
            self._kvm, self._vm = parts.own(prepared.kvm), parts.own(prepared.vm, is_lent=True)
            self._check_vcpu_count()
            self._add_memory()
        else:
            self._kvm = parts.own(Kvm())
            self._check_vcpu_count()
            self._vm = parts.own(self._kvm.create_vm(), is_lent=True)
            # Memory before the interrupt chips: after them the first slot waits for a grace period of the kernel.
            self._add_memory()
            self._vm.create_irqchip()
        if not self._config.acpi:
            self._vm.create_pit()  # without ACPI a kernel calibrates and ticks by it

    def _check_vcpu_count(self) -> None:
        most = self._kvm.check_extension(KVM_CAP_MAX_VCPUS)
        if self._config.vcpu_count > most:
            raise ConfigError(f"{self._config.vcpu_count} vCPUs asked for; KVM on this host allows {most}")

    def _add_memory(self) -> None:
        config, parts = self._config, self._parts
        memory = GuestMemory(config.memory_mib << 20, backing=config.effective_backing)
        parts.memory = parts.own(memory, is_lent=True)
        for slot, region in enumerate(parts.memory.regions):
            self._vm.set_memory_slot(slot, region.gpa, region.size, region.hva)
        if config.devices:
            from kvmlite.machine.virtio_slots import VirtioSlots

            self._virtio = VirtioSlots(config.devices, parts, self._vm)
        self._vm.set_identity_map_addr(layout.IDENTITY_MAP)
        self._vm.set_tss_addr(layout.TSS)

    def _eventfd(self, gsi: int | None = None) -> EventFd:
        eventfd: EventFd = self._parts.own(EventFd())
        if gsi is not None:
            self._vm.add_irqfd(eventfd.fd, gsi)
        return eventfd

    def _add_serial(self, name: str, base: int, gsi: int, sink: Callable[[bytes], None], reader: Reader) -> SerialPort:
        port: SerialPort = self._parts.own(
            SerialPort(name, sink, irq=self._eventfd(gsi), notify=self._eventfd(), reader=reader)
        )
        port.attach(self._parts.bus, self._loop, base)
        return port

    def _add_serial_ports(self, console: ConsoleSink) -> None:
        config, parts = self._config, self._parts
        parts.console = self._add_serial("serial0", layout.COM1_PORT, layout.COM1_GSI, console, console)
        if config.console_input_fd >= 0:
            parts.console.feed_from(config.console_input_fd)
        if config.agent_serial:
            from kvmlite.devices.serial_channel import SerialChannel

            channel = parts.own(SerialChannel())
            port = self._add_serial("serial1", layout.COM2_PORT, layout.COM2_GSI, channel.send, channel)
            channel.attach(port, self._loop)
            parts.agent_channel = channel

    def _add_power_registers(self) -> None:
        events = self._events
        registers = PowerRegisters(
            on_poweroff=events.on_poweroff, on_reset=events.on_reset, on_debug_exit=events.on_debug_exit
        )
        registers.attach(self._parts.bus)

    def _load_kernel(self) -> EntryState:
        from kvmlite.machine.kernel_loading import load

        entry, self._parts.boots_linux = load(self._config, self._parts.memory)
        return entry

    def _add_vcpus(self, entry: EntryState) -> None:
        config, parts = self._config, self._parts
        cpuid = self._kvm.supported_cpuid()
        tsc_deadline = bool(self._kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
        for vcpu_id in range(config.vcpu_count):
            vcpu: Vcpu = parts.own(self._vm.create_vcpu(vcpu_id, parts.bus.native))
            parts.vcpus.append(vcpu)
            set_topology(cpuid, vcpu_id, config.vcpu_count, tsc_deadline=tsc_deadline)
            vcpu.set_cpuid(cpuid)
        if parts.ack_ring is not None:
            parts.ack_ring.map(parts.vcpus[0].fd)
        boot_vcpu = parts.vcpus[0]
        enter(boot_vcpu, entry)


def enter(vcpu: Vcpu, entry: EntryState) -> None:
    """Give the first vCPU the state the kernel was promised."""
    gdt = {"gdt": layout.BOOT_GDT, "gdt_size": layout.BOOT_GDT_SIZE}
    if entry.mode == "long64":
        enter_long64(vcpu, page_table=entry.page_table, **gdt)
    else:
        enter_protected32(vcpu, **gdt)
    vcpu.set_regs({**entry.registers, "rip": entry.rip, "rflags": 2})
