"""How the host reaches the agent: vsock, a virtio-console port, or a second serial port; whichever the kernel has."""

from __future__ import annotations

from kvmlite.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmlite.images.initramfs import Initramfs
    from kvmlite.images.kernel_file import Kernel
    from kvmlite.machine.config import DeviceSpec
    from kvmlite.machine.machine import Machine

    class AgentChannel(Protocol):
        """One way to the agent."""

        devices: tuple[DeviceSpec, ...]
        needs_serial: bool

        @property
        def settings(self) -> dict[str, str]:
            """What the agent has to know (docs/agent.md)."""

        def open(self, machine: Machine, connected: Callable[[int], None]) -> None:
            """After ``Machine.start``: call ``connected`` with a stream's descriptor as soon as there is one."""

        def hang_up(self, machine: Machine) -> None:
            """The guest has ended: what it sent is still delivered, then the stream ends. Any thread."""

        def close(self) -> None:
            """Give back what it holds of the host, opened or not. Twice is harmless."""


AGENT_PORT = 1024
CONSOLE_PORT_NAME = "org.kvmlite.agent.0"


class VsockChannel:
    """The agent connects to port 1024 of the host."""

    needs_serial = False

    def __init__(self) -> None:
        from kvmlite.devices.vsock import Vsock

        self.devices: tuple[DeviceSpec, ...] = (Vsock(),)
        self.settings = {"channel": "vsock"}

    def open(self, machine: Machine, connected: Callable[[int], None]) -> None:
        """Listen for the agent."""
        from kvmlite.devices.vsock.device import VirtioVsock

        machine.device(VirtioVsock).listen(AGENT_PORT, connected)

    def hang_up(self, machine: Machine) -> None:
        """Serve what the guest had queued, then end all connections."""
        from kvmlite.devices.vsock.device import VirtioVsock

        machine.device(VirtioVsock).hang_up()

    def close(self) -> None:
        """Hold nothing of the host."""


class ConsoleChannel:
    """A named port of a virtio-console."""

    needs_serial = False

    def __init__(self) -> None:
        from kvmlite.devices.console import Console

        self.devices: tuple[DeviceSpec, ...] = (Console(ports=(CONSOLE_PORT_NAME,)),)
        self.settings = {"channel": "console"}

    def open(self, machine: Machine, connected: Callable[[int], None]) -> None:
        """The port has its descriptor from the start."""
        from kvmlite.devices.console.device import VirtioConsole

        connected(machine.device(VirtioConsole).port(CONSOLE_PORT_NAME).connect())

    def hang_up(self, machine: Machine) -> None:
        """Serve what the guest had queued, then close the ports."""
        from kvmlite.devices.console.device import VirtioConsole

        machine.device(VirtioConsole).hang_up()

    def close(self) -> None:
        """Hold nothing of the host."""


class SerialChannel:
    """The second serial port."""

    needs_serial = True
    devices: tuple[DeviceSpec, ...] = ()

    def __init__(self) -> None:
        self.settings = {"channel": "serial"}

    def open(self, machine: Machine, connected: Callable[[int], None]) -> None:
        """The port has its descriptor from the start."""
        connected(machine.take_agent_serial())

    def hang_up(self, machine: Machine) -> None:
        """Deliver what the port still holds, then end the stream."""
        machine.hang_up_agent_serial()

    def close(self) -> None:
        """Hold nothing of the host."""


class VhostVsockChannel:
    """The agent connects to a port of the host that is free, by a vsock device that the host's kernel serves."""

    needs_serial = False

    def __init__(self) -> None:
        from kvmlite.devices.vsock import Vsock
        from kvmlite.host.vsock import VsockListener

        self.devices: tuple[DeviceSpec, ...] = (Vsock(backend="vhost"),)
        self._listener = VsockListener()
        self.settings = {"channel": "vsock", "vsock_port": str(self._listener.port)}

    def open(self, machine: Machine, connected: Callable[[int], None]) -> None:
        """Wait for the agent."""
        from kvmlite.devices.vsock.vhost import VhostVsock

        machine.device(VhostVsock).serve(self._listener, connected)

    def hang_up(self, machine: Machine) -> None:
        """Let the kernel serve what the guest had queued, then end all connections."""
        from kvmlite.devices.vsock.vhost import VhostVsock

        machine.device(VhostVsock).hang_up()

    def close(self) -> None:
        """Give the port back."""
        self._listener.close()


# In order of preference: the module the guest's kernel needs, and the channel.
CHANNELS: dict[str, tuple[str, type[AgentChannel]]] = {
    "vsock": ("vmw_vsock_virtio_transport", VsockChannel),
    "console": ("virtio_console", ConsoleChannel),
    "serial": ("", SerialChannel),
    "vhost-vsock": ("vmw_vsock_virtio_transport", VhostVsockChannel),  # after one that all have: only by its name
}


def choose_channel(wanted: str, base: Initramfs, kernel: Kernel, *, acpi: bool = True) -> AgentChannel:
    """The channel asked for, or with ``auto`` the best the kernel has.

    Args:
        acpi: Whether the machine describes its devices by ACPI; without, few kernels find any but serial ports.

    Raises:
        ConfigError: The kernel has not what the one asked for needs.
    """
    finds_virtio = acpi or _reads_devices_from_cmdline(kernel)
    for name, (module, channel) in CHANNELS.items():
        has_it = not module or (finds_virtio and base.has_module(module))
        if wanted == name and not has_it:
            lacks = f"has no {module} module" if finds_virtio else "finds no virtio devices without ACPI"
            raise ConfigError(
                f"kernel {kernel.name} {lacks}, which --channel {name} needs",
                hint="--channel auto takes what there is",
            )
        if has_it and wanted in ("auto", name):
            return channel()
    raise AssertionError("a serial port needs no module")


def _reads_devices_from_cmdline(kernel: Kernel) -> bool:
    """Whether virtio_mmio.device= means something to it (Debian's kernels: no); yes if nobody knows."""
    if kernel.config is None:
        return True
    try:
        with open(kernel.config, "rb") as file:
            return b"\nCONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n" in file.read(4 << 20)
    except OSError:
        return True
