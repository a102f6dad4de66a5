"""The kernel, its command line, initrd and the machine's description (ACPI) go into guest memory."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.boot import load_kernel, open_kernel
from kvmlite.paths import vmlinux_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.boot import EntryState, KernelImage
    from kvmlite.machine.config import MachineConfig
    from kvmlite.memory.guest_memory import GuestMemory

# BIOS data area: Linux stores its reboot mode here before it resets (native_machine_emergency_restart). With
# ``reboot=panic_warm`` only a panic is warm, so this says which kind of reset it was.
REBOOT_FLAG = 0x472
REBOOT_FLAG_WARM = (0x1234).to_bytes(2, "little")


def load(config: MachineConfig, memory: GuestMemory) -> tuple[EntryState, bool]:
    """Fill guest memory; the state the first vCPU must have, and whether this is Linux.

    Raises:
        ImageError, ConfigError: The kernel or initrd is not what it has to be, or does not fit.
    """
    kernel = config.kernel
    with open_kernel(kernel.path) as image:
        cmdline, rsdp = kernel.cmdline, 0
        protocol = image.preferred_protocol if kernel.protocol == "auto" else kernel.protocol
        if protocol == "linux":
            memory.advise_huge_pages()
        if _wants_description(config, image):
            if config.acpi:
                rsdp = _install_acpi(config, memory)
            else:
                cmdline = _add_device_parameters(cmdline, len(config.devices))
        entry = load_kernel(
            memory,
            image,
            cmdline=cmdline,
            initrd=kernel.initrd or None,
            acpi_rsdp=rsdp,
            protocol=kernel.protocol,  # type: ignore[arg-type]  # checked by Kernel
            unpack=kernel.unpack,
            cache_dir=vmlinux_cache() if image.bzimage is not None else None,
        )
        return entry, protocol == "linux"


def _wants_description(config: MachineConfig, image: KernelImage) -> bool:
    """Whether the guest can make anything of ACPI; a small PVH kernel without devices cannot tell."""
    return bool(config.devices) or config.vcpu_count > 1 or config.agent_serial or image.preferred_protocol == "linux"


def _install_acpi(config: MachineConfig, memory: GuestMemory) -> int:
    from kvmlite.boot import acpi

    serial = (
        acpi.SerialPort(port=layout.COM1_PORT, gsi=layout.COM1_GSI),
        acpi.SerialPort(port=layout.COM2_PORT, gsi=layout.COM2_GSI),
    )
    tables = acpi.build_tables(
        vcpu_count=config.vcpu_count,
        serial_ports=serial if config.agent_serial else serial[:1],
        virtio_mmio=[layout.virtio_mmio_window(index) for index in range(len(config.devices))],
    )
    acpi.install(memory, tables)
    return int(tables.rsdp_gpa)


def _add_device_parameters(cmdline: str, device_count: int) -> str:
    from kvmlite.boot.cmdline import add_virtio_mmio

    return add_virtio_mmio(cmdline, [layout.virtio_mmio_window(index) for index in range(device_count)])


def panicked(memory: GuestMemory) -> bool:
    """Whether a guest that has just reset the machine did so because its kernel panicked."""
    return memory.read(REBOOT_FLAG, 2) == REBOOT_FLAG_WARM
