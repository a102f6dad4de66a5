"""A device that remembers what its transport did to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmlite.virtio.device import read_config_bytes
from kvmlite.virtio.queue import Virtqueue

if TYPE_CHECKING:
    from kvmlite.virtio.device import Interrupt


class Recorder:
    """Two queues, 16 bytes of config space, one feature (bit 5).

    Attributes:
        log: What happened, in order.
        on_visit: Replaces what a visit does: return all chains.
    """

    device_id = 42
    device_features = 1 << 5
    queues_elsewhere = False
    queue_sizes = (16, 8)

    def __init__(self, name: str = "recorder0") -> None:
        self.name = name
        self.log: list[tuple[object, ...]] = []
        self.config = bytearray(range(16))
        self.queues: tuple[Virtqueue, ...] = ()
        self.interrupt: Interrupt | None = None
        self.on_visit: Callable[[Virtqueue], None] = self.return_all
        self.on_activate: Callable[[], None] = lambda: None

    def read_config(self, offset: int, size: int) -> bytes:
        return read_config_bytes(bytes(self.config), offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        self.log.append(("config", offset, data))

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        self.log.append(("activate", driver_features))
        self.queues, self.interrupt = queues, interrupt
        self.on_activate()

    def reset(self) -> None:
        self.log.append(("reset",))
        self.queues = ()

    def process_queue(self, index: int) -> None:
        self.log.append(("visit", index))
        self.on_visit(self.queues[index])

    def return_all(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            queue.add_used(chain.head_index, 0)
        if queue.needs_interrupt():
            assert self.interrupt is not None
            self.interrupt.raise_queue()

    def close(self) -> None:
        self.log.append(("close",))
