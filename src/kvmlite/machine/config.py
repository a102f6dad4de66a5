"""What a machine shall be: frozen records, checked before anything is opened."""

from __future__ import annotations

from kvmlite.errors import ConfigError
from kvmlite.memory.guest_memory import BACKINGS
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Protocol

    from kvmlite.virtio.device import DeviceResources, VirtioDevice

    class DeviceSpec(Protocol):
        """A device to be: knows how to make it from what the machine hands out.

        If another process serves it, and has to map guest RAM, it has the attribute ``needs_shared_memory = True``.
        """

        def attach(self, resources: DeviceResources) -> VirtioDevice:
            """Make the device."""


MAX_VCPUS = 255
MIN_MEMORY_MIB = 2
MAX_MEMORY_MIB = 1 << 22  # 4 TiB
MAX_DEVICES_WITHOUT_ACPI = 11  # interrupts 5 to 15 of the 8259
PROTOCOLS = ("auto", "linux", "pvh", "multiboot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What to start.

    Attributes:
        path: bzImage, ELF vmlinux, PVH or multiboot kernel; recognised by content.
        cmdline: Handed to it as it is.
        initrd: Path of an initrd; several are joined (Linux reads concatenated archives), bytes are taken as they are.
        protocol: ``auto``, or ``linux``, ``pvh``, ``multiboot`` to insist.
        unpack: Unpack a bzImage on the host. False lets it unpack itself in the guest (slow, keeps KASLR).
    """

    path: str | os.PathLike[str]
    cmdline: str = ""
    initrd: tuple[str | os.PathLike[str] | bytes, ...] = ()
    protocol: str = "auto"
    unpack: bool = True

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown boot protocol {self.protocol!r}; choose one of {', '.join(PROTOCOLS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """A machine.

    Attributes:
        kernel: What runs in it.
        vcpu_count: 1 to 255, and no more than KVM allows.
        memory_mib: RAM in MiB, at least 2.
        memory_backing: ``anonymous``, ``memfd`` or ``hugepages``. Anonymous becomes memfd where another process serves a
            device and has to map it.
        devices: Specs such as ``Rng()``; the guest finds them in this order.
        acpi: Describe the machine by ACPI. Without, it has an 8254 timer and one vCPU, interrupts come through the
            8259 (so at most 11 devices), and virtio devices go on the kernel's command line.
        console_fd: Where the first serial port's output is written; -1 to keep only its last 64 KiB.
        console_input_fd: What is typed into it; -1 for nothing. Both descriptors stay the caller's.
        agent_serial: Add a second serial port whose host end is ``Machine.agent_serial_fd``.
    """

    kernel: Kernel
    vcpu_count: int = 1
    memory_mib: int = 256
    memory_backing: str = "anonymous"
    devices: tuple[DeviceSpec, ...] = ()
    acpi: bool = True
    console_fd: int = -1
    console_input_fd: int = -1
    agent_serial: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.vcpu_count <= MAX_VCPUS:
            raise ConfigError(f"{self.vcpu_count} vCPUs asked for; a machine has 1 to {MAX_VCPUS}")
        if not MIN_MEMORY_MIB <= self.memory_mib <= MAX_MEMORY_MIB:
            raise ConfigError(
                f"{self.memory_mib} MiB of memory asked for; a machine has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB",
                hint="128M is enough for a Linux kernel and a small initrd",
            )
        if not self.acpi and self.vcpu_count > 1:
            raise ConfigError(
                f"{self.vcpu_count} vCPUs asked for without ACPI: a kernel finds further vCPUs through ACPI only",
                hint="use one vCPU, or ACPI",
            )
        if not self.acpi and len(self.devices) > MAX_DEVICES_WITHOUT_ACPI:
            raise ConfigError(
                f"{len(self.devices)} devices asked for; without ACPI {MAX_DEVICES_WITHOUT_ACPI} are reached"
            )
        if self.memory_backing not in BACKINGS:
            raise ConfigError(f"unknown memory backing {self.memory_backing!r}; choose one of {', '.join(BACKINGS)}")

    @property
    def effective_backing(self) -> str:
        """What RAM is made of, with these devices."""
        is_shared = any(getattr(device, "needs_shared_memory", False) for device in self.devices)
        return "memfd" if is_shared and self.memory_backing == "anonymous" else self.memory_backing
