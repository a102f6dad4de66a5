"""What is behind a disk: the image, and its private copy if it has one; as C wants it (``disk.h``)."""

from __future__ import annotations

import mmap

from kvmlite._native import ffi, lib
from kvmlite.host.disk import DiskFile
from kvmlite.host.overlay import PrivateCopy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmlite.devices.blk import Disk

_BOUNCE_SIZE = 1 << 17
_STEP_SIZE = 1 << 24  # takes a slow disk a second or so


class Backing:
    """Opens and locks what a spec asks for.

    Attributes:
        path: Of the image, for messages.
        size: Bytes.
        block_size: Bytes of the smallest piece.
        native: ``struct kvl_disk *``.

    Raises:
        HostError, ImageError: As ``DiskFile`` and ``PrivateCopy``.
    """

    def __init__(self, spec: Disk) -> None:
        is_private = bool(spec.overlay)
        self._file = DiskFile(str(spec.path), read_only=spec.read_only or is_private, direct=spec.direct)
        self._copy: PrivateCopy | None = None
        self._memory: list[mmap.mmap] = []
        self._kept: list[Any] = []  # what C points to
        self.path, self.size, self.block_size = self._file.path, self._file.size, self._file.block_size
        self.native = ffi.new("struct kvl_disk *")
        self.native.fd, self.native.size, self.native.is_device = self._file.fd, self.size, self._file.is_device
        self.native.step_size = _STEP_SIZE
        try:
            if is_private:
                self._use_copy()
            if spec.direct:
                self._use_bounce()
        except BaseException:
            self.close()
            raise

    def _use_copy(self) -> None:
        self._copy = PrivateCopy(self._file)
        self.native.fd, self.native.is_device, self.native.is_private = self._copy.fd, False, True
        if self._copy.is_complete:
            return
        clusters = -(-self.size // lib.KVL_COW_CLUSTER)
        written = self._map(-(-clusters // 64) * 8)
        cow = ffi.new("struct kvl_cow *")
        lib.kvl_cow_init(cow, self._file.fd, self._copy.fd, self.size, ffi.cast("uint64_t *", written))
        self._kept.append(cow)
        self.native.cow = cow

    def _use_bounce(self) -> None:
        bounce = ffi.new("struct kvl_bounce *")
        lib.kvl_bounce_init(bounce, ffi.cast("uint8_t *", self._map(_BOUNCE_SIZE)), _BOUNCE_SIZE)
        self._kept.append(bounce)
        self.native.bounce, self.native.memory_align = bounce, self.block_size

    def _map(self, size: int) -> Any:
        """Zeroed, page-aligned memory, which takes space when it is used; until ``close``."""
        memory = mmap.mmap(-1, size)
        self._memory.append(memory)
        buffer = ffi.from_buffer(memory)
        self._kept.append(buffer)
        return buffer

    def close(self) -> None:
        """Close and unlock the image, throw the copy away. Workers have ended."""
        self.native.cow = self.native.bounce = ffi.NULL
        while self._kept:
            kept = self._kept.pop()
            if ffi.typeof(kept) is ffi.typeof("char[]"):
                ffi.release(kept)
        for memory in self._memory:
            memory.close()
        if self._copy is not None:
            self._copy.close()
        self._file.close()
