"""virtio-console: a terminal for the guest, and named byte streams. The spec is here, the device loads with a machine."""

from __future__ import annotations

from kvmlite.errors import ConfigError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.devices.console.device import VirtioConsole
    from kvmlite.virtio.device import DeviceResources

MAX_PORTS = 31  # with the console itself; Linux takes no more than 512
MAX_NAME_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """A console device.

    Attributes:
        ports: Names of further ports; the guest finds one as ``/dev/virtio-ports/NAME``.
        cols, rows: Size of the terminal at the start, in characters; 0 if unknown.
    """

    ports: tuple[str, ...] = ()
    cols: int = 80
    rows: int = 24

    def __post_init__(self) -> None:
        if len(self.ports) > MAX_PORTS - 1:
            raise ConfigError(f"console: {len(self.ports)} ports, allowed are {MAX_PORTS - 1}")
        if len(set(self.ports)) != len(self.ports):
            raise ConfigError("console: two ports have the same name")
        for name in self.ports:
            if not (0 < len(name) <= MAX_NAME_SIZE and name.isascii() and name.isprintable()) or "/" in name:
                raise ConfigError(
                    f"console: port name {name!r} is not 1 to {MAX_NAME_SIZE} printable ASCII characters without a slash",
                    hint="use a reversed domain name, such as org.example.channel.0",
                )
        for what, value in (("cols", self.cols), ("rows", self.rows)):
            if not 0 <= value <= 0xFFFF:
                raise ConfigError(f"console: {what}={value} is not in 0..65535")

    def attach(self, resources: DeviceResources) -> VirtioConsole:
        """Make the device."""
        from kvmlite.devices.console.device import VirtioConsole

        return VirtioConsole(resources.name, resources.loop, self.ports, cols=self.cols, rows=self.rows)
