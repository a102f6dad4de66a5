"""virtio-pmem: a file of the host as memory of the guest (VIRTIO 1.2, 5.19).

The guest reads and writes the host's page cache itself, with no request and no exit; only a flush comes here.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from kvmlite.abi.virtio import VIRTIO_ID_PMEM
from kvmlite.abi.virtio_pmem import (
    PMEM_RESP_EIO,
    PMEM_RESP_OK,
    VIRTIO_PMEM_CONFIG,
    VIRTIO_PMEM_REQ,
    VIRTIO_PMEM_REQ_TYPE_FLUSH,
    VIRTIO_PMEM_RESP,
)
from kvmlite.errors import ConfigError, GuestFault, StateError
from kvmlite.host.disk import DiskFile
from kvmlite.memory.file_mapping import FileMapping
from kvmlite.records import dataclass
from kvmlite.virtio.device import read_config_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.virtio.device import DeviceResources, Interrupt
    from kvmlite.virtio.queue import DescriptorChain, Virtqueue

MODES = ("read-only", "private", "shared")
SYNC_TIMEOUT_S = 30.0
"""How long the end of the machine waits for a flush under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pmem:
    """A file or block device as persistent memory: ``/dev/pmem0`` in a Linux guest.

    Attributes:
        path: The file, such as an image of a file system. It must not become shorter while the machine runs.
        mode: ``read-only``: what the guest writes goes nowhere, and it is not told. ``private``: its writes are its own
            and end with it. ``shared``: its writes go to the file, which belongs to one machine at a time.
    """

    path: str | os.PathLike[str]
    mode: str = "read-only"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"pmem: unknown mode {self.mode!r}; choose one of {', '.join(MODES)}")

    @property
    def keeps_writes(self) -> bool:
        """What the guest writes outlives the machine."""
        return self.mode == "shared"

    def attach(self, resources: DeviceResources) -> VirtioPmem:
        """Open, lock and map the file.

        Raises:
            HostError: It cannot be opened or mapped, or another machine uses it.
            ImageError: It is empty, or neither file nor block device.
        """
        return VirtioPmem(resources, os.fspath(self.path), self.mode)


class VirtioPmem:
    """One mapped file, and its flushes.

    Args:
        resources: What the machine hands out.
        path, mode: As in :class:`Pmem`.

    Thread: queue on the device loop; fdatasync on a thread of its own, which only a ``shared`` file has.
    """

    device_id = VIRTIO_ID_PMEM
    queue_sizes = (64,)
    device_features = 0
    queues_elsewhere = False

    def __init__(self, resources: DeviceResources, path: str, mode: str) -> None:
        self.name = resources.name
        self._resources = resources
        self._queue: Virtqueue | None = None
        self._interrupt: Interrupt | None = None
        self._syncer: Syncer | None = None
        self._has_warned = False
        self._file = DiskFile(path, read_only=mode != "shared")
        try:
            self._mapping = FileMapping(
                self._file.fd, self._file.size, shared=mode != "private", writable=mode != "read-only"
            )
        except BaseException:
            self._file.close()
            raise
        try:
            gpa = resources.map_memory(self._mapping.hva, self._mapping.size, read_only=mode == "read-only")
            self._config = VIRTIO_PMEM_CONFIG.pack(gpa, self._mapping.size)
            if mode == "shared":
                self._syncer = Syncer(self._file.fd, self._synced)
        except BaseException:
            self.close()
            raise

    # ---- VirtioDevice ----

    def read_config(self, offset: int, size: int) -> bytes:
        """Return part of ``struct virtio_pmem_config``. Spec: VIRTIO 1.2, 5.19.4."""
        return read_config_bytes(self._config, offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: no field is writable."""

    def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
        """Start with the driver's queue."""
        self._queue, self._interrupt = queues[0], interrupt

    def reset(self) -> None:
        """Forget the driver; the end of a flush under way is told to nobody."""
        self._resources.loop.call(self._reset)

    def _reset(self) -> None:
        self._queue = self._interrupt = None

    def process_queue(self, index: int) -> None:
        """Take flush requests: to the syncer if there is something to sync, else they are done.

        Spec: VIRTIO 1.2, 5.19.6.
        """
        queue = self._queue
        if queue is None:
            return
        flushes: list[DescriptorChain] = []
        while (chain := queue.pop()) is not None:
            if chain.writable_size < VIRTIO_PMEM_RESP.size:
                raise GuestFault(f"{self.name}: request with {chain.writable_size} bytes for the answer, 4 are needed")
            request = chain.read(0, VIRTIO_PMEM_REQ.size)
            if request != VIRTIO_PMEM_REQ.pack(VIRTIO_PMEM_REQ_TYPE_FLUSH):
                self._answer(queue, [chain], PMEM_RESP_EIO)
            else:
                flushes.append(chain)
        if self._syncer is None:
            self._answer(queue, flushes, PMEM_RESP_OK)
        elif flushes:
            self._syncer.sync(lambda error: self._flushed(queue, flushes, error))

    def _synced(self, done: Callable[[], None]) -> None:
        try:
            self._resources.loop.post(done)
        except StateError:  # the machine has ended: nobody waits for the answer
            return

    def _flushed(self, queue: Virtqueue, chains: list[DescriptorChain], error: OSError | None) -> None:
        if error is not None and not self._has_warned:
            self._has_warned = True
            self._resources.warn(
                f"{self.name}: cannot write to {self._file.path}: {error.strerror}; the guest was told"
            )
        if queue is self._queue:
            self._answer(queue, chains, PMEM_RESP_OK if error is None else PMEM_RESP_EIO)

    def _answer(self, queue: Virtqueue, chains: list[DescriptorChain], result: int) -> None:
        for chain in chains:
            queue.add_used(chain.head_index, chain.write(VIRTIO_PMEM_RESP.pack(result)))
        if chains and self._interrupt is not None and queue.needs_interrupt():
            self._interrupt.raise_queue()

    def close(self) -> None:
        """Wait for a flush under way; unmap and close the file. Tell if it was cut short."""
        if self._syncer is not None and not self._syncer.close(SYNC_TIMEOUT_S):
            self._resources.warn(f"{self.name}: a flush of {self._file.path} did not end within {SYNC_TIMEOUT_S:g} s")
            return  # its descriptor is in use
        file = self._file
        size = os.lseek(file.fd, 0, os.SEEK_END)
        if size < file.size:
            self._resources.warn(
                f"{self.name}: {file.path} was cut short from {file.size} to {size} bytes while the guest had it"
            )
        self._mapping.close()
        file.close()


class Syncer:
    """Runs fdatasync where it may block. All that is asked for while one is under way is done by the next.

    Args:
        fd: The file; the caller's.
        post: Hands a function to the thread that shall run it.

    Thread: any, but ``close`` once.
    """

    def __init__(self, fd: int, post: Callable[[Callable[[], None]], None]) -> None:
        self._fd = fd
        self._post = post
        self._wanted: SimpleQueue[Callable[[OSError | None], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pmem-sync", daemon=True)
        self._thread.start()

    def sync(self, done: Callable[[OSError | None], None]) -> None:
        """Bring to the disk what has been written so far; ``done`` is told how that went, by ``post``."""
        self._wanted.put(done)

    def close(self, timeout_s: float) -> bool:
        """End the thread after what was asked for; False if that takes longer."""
        self._wanted.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (first := self._wanted.get()) is not None:
            together = [first]
            while not self._wanted.empty():
                following = self._wanted.get()
                if following is None:
                    self._wanted.put(None)
                    break
                together.append(following)
            error = self._sync()
            for done in together:
                self._post(partial(done, error))

    def _sync(self) -> OSError | None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            return error
        return None
