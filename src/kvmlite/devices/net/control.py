"""The control queue: what the driver asks of the card as a whole (VIRTIO 1.2, 5.1.6.5). On the device loop."""

from __future__ import annotations

import os
from struct import Struct

from kvmlite.abi.virtio_net import (
    VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_ERR,
    VIRTIO_NET_OK,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import DescriptorChain, Virtqueue

    class Card(Protocol):
        """What commands act on."""

        def set_queue_pairs(self, count: int) -> bool:
            """Serve so many pairs; whether that is possible."""

        def set_guest_offloads(self, features: int) -> bool:
            """Hand over frames with these offloads and no others; whether that is possible."""


COMMAND_LIMIT = 64
"""Bytes looked at of a command: no command that is understood is longer."""
VISIT_BUDGET = 16

_HEADER = Struct("<BB")  # class, command
_PAIRS = Struct("<H")
_OFFLOADS = Struct("<Q")


class ControlQueue:
    """Answers commands, one after another.

    Args:
        queue: The control queue, in use.
        interrupt: The device's.
        card: Whom to ask.

    Thread: the device loop.
    """

    def __init__(self, queue: Virtqueue, interrupt: Interrupt, card: Card) -> None:
        self._queue = queue
        self._interrupt = interrupt
        self._card = card

    def on_kick(self) -> None:
        """Answer what waits."""
        try:
            os.eventfd_read(self._queue.kick_eventfd)
        except BlockingIOError:
            return
        self._queue.begin_visit(VISIT_BUDGET)
        while (chain := self._queue.pop()) is not None:
            self._queue.add_used(chain.head_index, self._answer(chain))
        if self._queue.needs_interrupt():
            self._interrupt.raise_queue()
        if self._queue.end_visit():
            self._queue.kick()

    def _answer(self, chain: DescriptorChain) -> int:
        command = chain.read(0, COMMAND_LIMIT)
        is_done = len(command) >= _HEADER.size and self._do(command[0], command[1], command[_HEADER.size :])
        return chain.write(bytes([VIRTIO_NET_OK if is_done else VIRTIO_NET_ERR]))

    def _do(self, kind: int, command: int, data: bytes) -> bool:
        if kind == VIRTIO_NET_CTRL_RX:
            return True  # modes and filters: the driver gets all frames, and drops those it did not ask for
        if (kind, command) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) and len(data) >= _PAIRS.size:
            return self._card.set_queue_pairs(_PAIRS.unpack_from(data)[0])
        is_offloads = (kind, command) == (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
        if is_offloads and len(data) >= _OFFLOADS.size:
            return self._card.set_guest_offloads(_OFFLOADS.unpack_from(data)[0])
        return False
