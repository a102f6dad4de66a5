"""Control messages between driver and device: which ports there are, who has opened them (VIRTIO 1.2, 5.3.6.2).

What the device has to say is a set of bits per port, not a queue: a driver that asks again and again without
giving buffers for the answers costs nothing.
"""

from __future__ import annotations

from kvmlite.abi.virtio_console import (
    VIRTIO_CONSOLE_CONTROL,
    VIRTIO_CONSOLE_RESIZE_SIZE,
    ConsoleEvent,
)
from kvmlite.errors import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.devices.console.port import ConsolePort
    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import Virtqueue

# What a port's driver has yet to be told, in the order in which it is.
_ADD = 1
_DESCRIBE = 2
_RESIZE = 4
_CLOSE = 8
_OPEN = 16
_ORDER = (_ADD, _DESCRIBE, _RESIZE, _CLOSE, _OPEN)


class _PortView:
    """What the driver knows of one port."""

    __slots__ = ("is_ready", "is_told_open", "owed", "port")

    def __init__(self, port: ConsolePort) -> None:
        self.port = port
        self.owed = 0
        self.is_ready = False
        self.is_told_open = False


class ControlChannel:
    """The two control queues of a driver that knows MULTIPORT.

    Args:
        rx: Device to driver.
        tx: Driver to device.
        interrupt: Towards the driver.
        ports: All of them, by number.
        size: Returns (cols, rows) of the console; (0, 0) if unknown.

    Thread: the device loop.
    """

    def __init__(
        self,
        rx: Virtqueue,
        tx: Virtqueue,
        interrupt: Interrupt,
        ports: tuple[ConsolePort, ...],
        size: Callable[[], tuple[int, int]],
    ) -> None:
        self._rx, self._tx = rx, tx
        self._interrupt = interrupt
        self._views = tuple(_PortView(port) for port in ports)
        self._size = size

    def receive(self) -> None:
        """Take the driver's messages and answer them.

        Raises:
            GuestFault: A message is shorter than its header.
        """
        while (chain := self._tx.pop()) is not None:
            message = chain.read(0, VIRTIO_CONSOLE_CONTROL.size)
            self._tx.add_used(chain.head_index, 0)
            if len(message) < VIRTIO_CONSOLE_CONTROL.size:
                raise GuestFault(f"control message of {len(message)} bytes, needed are {VIRTIO_CONSOLE_CONTROL.size}")
            self._handle(*VIRTIO_CONSOLE_CONTROL.unpack(message))
        if self._tx.needs_interrupt():
            self._interrupt.raise_queue()
        self.send_owed()

    def _handle(self, number: int, event: int, value: int) -> None:
        if event == ConsoleEvent.DEVICE_READY:
            for view in self._views:
                view.owed = _ADD if value == 1 else 0
                view.is_ready = view.is_told_open = False
        elif number >= len(self._views):
            return
        elif event == ConsoleEvent.PORT_READY:
            self._port_ready(self._views[number], value == 1)
        elif event == ConsoleEvent.PORT_OPEN:
            self._views[number].port.set_guest_open(value == 1)

    def _port_ready(self, view: _PortView, is_ready: bool) -> None:
        view.is_ready = is_ready
        view.owed = 0
        if is_ready:
            view.owed = _DESCRIBE
            view.owed |= _RESIZE if view.port.number == 0 and any(self._size()) else 0
            view.owed |= _OPEN if view.port.is_connected else 0

    def tell_host_change(self, port: ConsolePort) -> None:
        """The host's end of a port came or went."""
        view = self._views[port.number]
        if not view.is_ready:
            return
        view.owed &= ~_OPEN
        if port.is_connected:
            view.owed |= _OPEN
        elif view.is_told_open:
            view.owed |= _CLOSE
        self.send_owed()

    def tell_size(self) -> None:
        """The console has another size."""
        if self._views[0].is_ready:
            self._views[0].owed |= _RESIZE
            self.send_owed()

    def send_owed(self) -> None:
        """Send as many messages as there are buffers for; the driver's next buffer continues."""
        for view in self._views:
            for what in _ORDER:
                if view.owed & what and not self._send(view, what):
                    return
        if self._rx.needs_interrupt():
            self._interrupt.raise_queue()

    def _send(self, view: _PortView, what: int) -> bool:
        chain = self._rx.pop()
        if chain is None:
            if self._rx.needs_interrupt():
                self._interrupt.raise_queue()
            return False
        message = self._message(view, what)
        if chain.writable_size < len(message):
            size = chain.writable_size
            self._rx.add_used(chain.head_index, 0)
            self._rx.fail(GuestFault(f"control buffer of {size} bytes, needed are {len(message)}"))
            return False
        self._rx.add_used(chain.head_index, chain.write(message))
        view.owed &= ~what
        if what in (_OPEN, _CLOSE):
            view.is_told_open = what == _OPEN
        return True

    def _message(self, view: _PortView, what: int) -> bytes:
        number, name = view.port.number, view.port.name
        pack = VIRTIO_CONSOLE_CONTROL.pack
        if what == _ADD:
            return pack(number, ConsoleEvent.PORT_ADD, 0)
        if what == _RESIZE:
            return pack(number, ConsoleEvent.RESIZE, 0) + VIRTIO_CONSOLE_RESIZE_SIZE.pack(*self._size())
        if what == _DESCRIBE and name:
            return pack(number, ConsoleEvent.PORT_NAME, 1) + name.encode()
        if what == _DESCRIBE:
            return pack(number, ConsoleEvent.CONSOLE_PORT, 1)
        return pack(number, ConsoleEvent.PORT_OPEN, 1 if what == _OPEN else 0)
