"""A file mapped into this process so that a guest can have it as memory."""

from __future__ import annotations

import os

from kvmlite._native import ffi, lib
from kvmlite.errors import HostError
from kvmlite.memory.guest_memory import HUGE_PAGE_SIZE


class FileMapping:
    """All of a file at a 2 MiB boundary, then zeros up to the next one.

    Nothing in this process may touch it: where the file has been cut short that is a SIGBUS.

    Args:
        fd: The file; may be closed afterwards.
        file_size: Its bytes, at least 1.
        shared: Writes go to the file; else they stay here and end with the mapping.
        writable: Writes are allowed.

    Attributes:
        hva, size: Where, and how long with the zeros: multiples of 2 MiB.

    Raises:
        HostError: The host cannot map it.
    """

    def __init__(self, fd: int, file_size: int, *, shared: bool, writable: bool) -> None:
        self.size = (file_size + HUGE_PAGE_SIZE - 1) // HUGE_PAGE_SIZE * HUGE_PAGE_SIZE
        pointer = lib.kvl_mem_map_file(self.size, fd, file_size, shared, writable)
        if pointer == ffi.NULL:
            number = ffi.errno
            raise HostError(f"cannot map {file_size} bytes of a file: {os.strerror(number)}", number)
        self.hva = int(ffi.cast("uintptr_t", pointer))

    def close(self) -> None:
        """Unmap it. Twice is harmless."""
        if self.hva:
            lib.kvl_mem_unmap(ffi.cast("uint8_t *", self.hva), self.size)
            self.hva = 0
