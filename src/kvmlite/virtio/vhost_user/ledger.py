"""Which requests are under way in another process, known exactly also when it answers out of order."""

from __future__ import annotations

from kvmlite._native import ffi, lib
from kvmlite.host.eventfd import EventFd
from kvmlite.virtio.worker import QueueWorker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kvmlite.virtio.queue import Virtqueue


class _Entry:
    """One queue's."""

    def __init__(self, queue: Virtqueue, irq_fd: int) -> None:
        self.queue = queue
        self.irq_fd = irq_fd
        self.call = EventFd()
        self.open = ffi.new("uint8_t[]", queue.size)
        self.native: Any = ffi.new("struct kvl_ledger *")
        self.begin(0)

    def begin(self, index: int) -> None:
        lib.kvl_ledger_init(self.native, self.queue.native, self.open, index, self.call.fd, self.irq_fd)


class Ledger:
    """Stands between a back end and the interrupt: passes it on, and takes down the progress of each queue.

    Args:
        name: Of its thread.
        queues: Those of the device; nothing is under way in them.
        irq_fd: The device's irqfd; the caller's.

    Thread: one at a time; a worker in C while it runs.
    """

    def __init__(self, name: str, queues: Sequence[Virtqueue], irq_fd: int) -> None:
        self._irq_fd = irq_fd
        self._worker = QueueWorker(name, lambda code, source: False)
        self._entries: dict[int, _Entry] = {}
        try:
            for queue in queues:
                if queue.layout is not None:
                    entry = self._entries[queue.index] = _Entry(queue, irq_fd)
                    lib.kvl_ledger_add_to_worker(entry.native, self._worker.native)
        except BaseException:
            self.close()
            raise

    def call_fd(self, queue: Virtqueue) -> int:
        """What the back end is to signal for a queue."""
        entry = self._entries.get(queue.index)
        return self._irq_fd if entry is None else entry.call.fd

    def start(self) -> None:
        """Pass interrupts on."""
        self._worker.start()

    def stop(self) -> None:
        """Pass on no more; harmless when it does not run."""
        self._worker.stop()

    def under_way(self, queue: Virtqueue) -> tuple[int, int, list[int]] | None:
        """Return (available index, used index, heads under way); None if they are not known for certain.

        After ``stop``, and when the back end has ended.
        """
        entry = self._entries.get(queue.index)
        if entry is None:
            return None
        lib.kvl_ledger_update(entry.native)
        native = entry.native
        heads = [head for head in range(queue.size) if entry.open[head]]
        is_sound = len(heads) == (native.avail_idx - native.used_idx) & 0xFFFF and all(
            entry.open[h] == 1 for h in heads
        )
        return None if native.is_lost or not is_sound else (native.avail_idx, native.used_idx, heads)

    def forget(self, queue: Virtqueue, index: int) -> None:
        """Begin anew at an index up to which everything has been given back."""
        entry = self._entries.get(queue.index)
        if entry is not None:
            entry.begin(index)

    def close(self) -> None:
        """Stop, and give the descriptors back."""
        self._worker.close()
        for entry in self._entries.values():
            entry.call.close()
