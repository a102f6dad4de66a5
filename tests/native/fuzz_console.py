"""Fuzzes virtio-console: the queues of two ports and the control queues, with hosts that come, write, stop reading and go."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from fuzzkit.ends import Ends
from fuzzkit.target import DeviceTarget

from kvmlite.abi.virtio_console import CONTROL_TX_QUEUE, VIRTIO_CONSOLE_CONTROL
from kvmlite.devices.console.device import VirtioConsole
from kvmlite.testing import Used

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzzkit.target import Kick, Op

    from kvmlite.testing import DriverQueue
    from kvmlite.virtio.device import DeviceResources

COLS, ROWS = 80, 24
EVENTS = (0, 0, 3, 3, 3, 6, 6, 6, 6, 1, 2, 4, 5, 7, 8, 0xFFFF)
NUMBERS = (0, 0, 0, 1, 1, 1, 2, 0xFFFFFFFF)


class Target(DeviceTarget):
    """A console and one named port."""

    holds = (1, 1, 0, 0, 1, 1)  # what the host has no bytes for, or has not taken
    honest_queue = 1

    def attach(self, resources: DeviceResources) -> VirtioConsole:
        self._loop = resources.loop
        self.device = VirtioConsole(resources.name, resources.loop, ("port",), cols=COLS, rows=ROWS)
        self._ends = Ends()
        return self.device

    def message(self, op: Op) -> bytes:
        if op.queue == CONTROL_TX_QUEUE:
            event = op.value & 0xFFFF if op.value >> 32 & 15 == 15 else EVENTS[op.index & 15]
            value = 1 if op.value & 3 else op.value >> 8 & 0xFFFF
            message = VIRTIO_CONSOLE_CONTROL.pack(NUMBERS[op.value >> 4 & 7], event, value)
            return message[: op.size >> 4 & 7] if op.size & 15 == 15 else message
        return bytes(op.size % 700)

    def host(self, op: Op) -> None:
        acts: tuple[Callable[[Op], None], ...] = (
            self._connect, self._connect, self._ends.write, self._ends.write, self._ends.read, self._shut,
            self._ends.close, self._resize, self._hang_up, self._sink,
        )  # fmt: skip
        acts[op.index % len(acts)](op)

    def _connect(self, op: Op) -> None:
        port = self.device.ports[op.value & 1]
        end = socket.socket(fileno=port.connect())
        assert port._next is not None
        port._next.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)  # as little as there is
        self._ends.add(end)

    def _shut(self, op: Op) -> None:
        if end := self._ends.choose(op):
            end.shutdown(socket.SHUT_WR)

    def _resize(self, op: Op) -> None:
        self.device.resize(op.value & 0xFFFF, op.value >> 16 & 0xFFFF)

    def _hang_up(self, op: Op) -> None:
        self.device.hang_up()

    def _sink(self, op: Op) -> None:
        self.device.ports[op.value & 1].set_sink((lambda data: None) if op.value & 2 else None)

    def end_case(self) -> None:
        self._ends.close_all()
        for port in self.device.ports:
            port.set_sink(None)
        self.device._size = COLS, ROWS

    def honest(self, queue: DriverQueue, kick: Kick) -> None:
        heard: list[bytes] = []
        self.device.console.set_sink(heard.append)
        head = queue.add_chain(readable=[b"hello ", b"world"])
        kick()
        assert queue.take_used() == Used(head, 0)
        assert b"".join(heard) == b"hello world"
