"""virtio-console with several ports (VIRTIO 1.2, 5.3).

::

    device.py   config space, queues, threads    port.py     one port: guest queues and a host socket
    control.py  which ports there are, who opened them
"""

from __future__ import annotations

from kvmlite.abi.virtio import VIRTIO_ID_CONSOLE
from kvmlite.abi.virtio_console import (
    CONTROL_RX_QUEUE,
    CONTROL_TX_QUEUE,
    VIRTIO_CONSOLE_CONFIG,
    VIRTIO_CONSOLE_F_MULTIPORT,
    VIRTIO_CONSOLE_F_SIZE,
)
from kvmlite.devices.console.control import ControlChannel
from kvmlite.devices.console.port import ConsolePort
from kvmlite.virtio.device import read_config_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.host.loop import DeviceLoop
    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import Virtqueue

_PORT_QUEUE_SIZE = 128
_CONTROL_QUEUE_SIZE = 32


class VirtioConsole:
    """A console (port 0, ``/dev/hvc0`` in Linux) and named ports (``/dev/virtio-ports/NAME``).

    A driver without MULTIPORT sees the console only.

    Args:
        name: How messages call the device.
        loop: The device loop.
        port_names: Names of ports 1 and up.
        cols, rows: Size of the console in characters; 0 if unknown.

    Thread: queues and host sockets belong to the device loop; ``port``, ``resize`` and config reads are for any thread.
    """

    device_id = VIRTIO_ID_CONSOLE
    device_features = 1 << VIRTIO_CONSOLE_F_SIZE | 1 << VIRTIO_CONSOLE_F_MULTIPORT
    queues_elsewhere = False

    def __init__(
        self, name: str, loop: DeviceLoop, port_names: tuple[str, ...] = (), *, cols: int = 0, rows: int = 0
    ) -> None:
        self.name = name
        self.ports = tuple(
            ConsolePort(number, port_name, loop, self._host_changed)
            for number, port_name in enumerate(("", *port_names))
        )
        self.queue_sizes = (
            (_PORT_QUEUE_SIZE,) * 2 + (_CONTROL_QUEUE_SIZE,) * 2 + (_PORT_QUEUE_SIZE,) * 2 * len(port_names)
        )
        self._loop = loop
        self._size = (cols, rows)
        self._control: ControlChannel | None = None
        self._interrupt: Interrupt | None = None

    # ---- the host's face ----

    @property
    def console(self) -> ConsolePort:
        """Port 0.

        Linux waits for its console, with interrupts off: who connects to it has to read.
        """
        return self.ports[0]

    def port(self, name: str) -> ConsolePort:
        """Return the port of that name.

        Raises:
            KeyError: There is none.
        """
        for port in self.ports[1:]:
            if port.name == name:
                return port
        raise KeyError(f"{self.name} has no port {name!r}")

    def resize(self, cols: int, rows: int) -> None:
        """Tell the guest the terminal's new size, in characters (0 to 65535 each)."""
        if not (0 <= cols <= 0xFFFF and 0 <= rows <= 0xFFFF):
            raise ValueError(f"{self.name}: a console of {cols}x{rows} characters")
        self._loop.post(lambda: self._resize(cols, rows))

    def _resize(self, cols: int, rows: int) -> None:
        def update() -> None:
            self._size = (cols, rows)

        if self._interrupt is None:
            update()
            return
        self._interrupt.raise_config(update)
        if self._control is not None:
            self._control.tell_size()

    # ---- VirtioDevice ----

    def read_config(self, offset: int, size: int) -> bytes:
        """Return part of ``struct virtio_console_config``. Spec: VIRTIO 1.2, 5.3.4."""
        cols, rows = self._size
        return read_config_bytes(VIRTIO_CONSOLE_CONFIG.pack(cols, rows, len(self.ports), 0), offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: emergency output is not offered."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Start, on the loop: the host's ends live there."""
        has_multiport = bool(driver_features >> VIRTIO_CONSOLE_F_MULTIPORT & 1)
        self._loop.post(lambda: self._start(queues, interrupt, has_multiport))

    def _start(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, has_multiport: bool) -> None:
        self._interrupt = interrupt
        for port in self.ports if has_multiport else self.ports[:1]:
            rx_index = 2 * port.number + (2 if port.number else 0)
            port.start(queues[rx_index], queues[rx_index + 1], interrupt)
        if has_multiport:
            rx, tx = queues[CONTROL_RX_QUEUE], queues[CONTROL_TX_QUEUE]
            self._control = ControlChannel(rx, tx, interrupt, self.ports, lambda: self._size)
        else:
            self.console.set_guest_open(True)
        for queue in queues:  # a kick may have come before this ran
            queue.kick()

    def reset(self) -> None:
        """Forget the driver; host ends read end of stream."""
        self._loop.call(self._reset)

    def _reset(self) -> None:
        self._control = self._interrupt = None
        for port in self.ports:
            port.stop()

    def hang_up(self) -> None:
        """The guest has ended: hosts get what it had queued, then end of stream. Thread: any."""
        self._loop.call(self._hang_up)

    def _hang_up(self) -> None:
        for port in self.ports:
            port.set_guest_open(False)

    def process_queue(self, index: int) -> None:
        """Serve the queue of a port or of the control channel."""
        if index in (CONTROL_RX_QUEUE, CONTROL_TX_QUEUE):
            if self._control is None:
                return
            if index == CONTROL_TX_QUEUE:
                self._control.receive()
            else:
                self._control.send_owed()
            return
        port = self.ports[0 if index < CONTROL_RX_QUEUE else index // 2 - 1]
        if index % 2:
            port.pump_output()
        else:
            port.resume_input()

    def close(self) -> None:
        """Close the host's ends."""
        for port in self.ports:
            port.close()

    def _host_changed(self, port: ConsolePort) -> None:
        if self._control is not None:
            self._control.tell_host_change(port)
