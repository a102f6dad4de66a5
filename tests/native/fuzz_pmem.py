"""Fuzzes the queue of virtio-pmem; flushes end at once, later, or with an error, as the input says."""

from __future__ import annotations

import errno
import os
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

from fuzzkit.target import DeviceTarget

from kvmlite.devices.pmem import VirtioPmem
from kvmlite.testing import Used

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzzkit.target import Kick, Op

    from kvmlite.testing import DriverQueue
    from kvmlite.virtio.device import DeviceResources

    Done = Callable[[OSError | None], None]


class SteeredSyncer:
    """Stands in for ``Syncer``, whose thread would make each run another one."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._waiting: list[Done] = []
        self.is_slow = False
        self.error: OSError | None = None

    def sync(self, done: Done) -> None:
        """Do as ``Syncer`` does."""
        self._waiting.append(done)
        if not self.is_slow:
            self.finish()

    def finish(self) -> None:
        """End the flushes under way."""
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            self._post(partial(done, self.error))


class Target(DeviceTarget):
    """A file of one page."""

    def attach(self, resources: DeviceResources) -> VirtioPmem:
        fd, path = tempfile.mkstemp(prefix="kvmlite-fuzz-")
        os.truncate(fd, 4096)
        os.close(fd)
        try:
            device = VirtioPmem(resources, path, "private")
        finally:
            os.unlink(path)
        self._syncer = SteeredSyncer(device._synced)
        stand_in: Any = self._syncer
        device._syncer = stand_in
        return device

    def message(self, op: Op) -> bytes:
        request = (0, 0, 0, 1, op.value & 0xFFFFFFFF)[op.index % 5].to_bytes(4, "little")
        return request[: op.size % 5] if op.index % 4 == 3 else request

    def host(self, op: Op) -> None:
        self._syncer.error = OSError(errno.EIO, os.strerror(errno.EIO)) if op.value & 1 else None
        self._syncer.is_slow = bool(op.index & 1)
        self.holds = (64,) if self._syncer.is_slow else ()
        if op.value & 2 or not self._syncer.is_slow:
            self._syncer.finish()

    def end_case(self) -> None:
        self._syncer.finish()
        self._syncer.error, self._syncer.is_slow, self.holds = None, False, ()

    def honest(self, queue: DriverQueue, kick: Kick) -> None:
        head = queue.add_chain(readable=[bytes(4)], writable=[4])
        kick()
        used = queue.take_used()
        assert used == Used(head, 4)
        assert used.data == bytes(4)
