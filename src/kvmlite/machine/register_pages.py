"""The registers of virtio-mmio devices in pages that the guest may read, so that a load is no exit (ADR 9)."""

from __future__ import annotations

import mmap

from kvmlite._native import ffi
from kvmlite.abi import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kvmlite.abi.layout import MmioWindow
    from kvmlite.machine.memory_slots import MemorySlots


class RegisterPages:
    """One page for each device; its registers are the end of it, the rest is zeros.

    Args:
        windows: Where the devices are.

    Thread: the one that builds the machine.
    """

    def __init__(self, windows: Sequence[MmioWindow]) -> None:
        self._windows = windows
        self._pages = mmap.mmap(-1, len(windows) * layout.PAGE_SIZE)
        self._view = ffi.from_buffer("char[]", self._pages, require_writable=True)

    def map(self, slots: MemorySlots) -> None:
        """Let the guest read them. Without, each load is an exit.

        Raises:
            KvmError: KVM refuses.
        """
        hva = int(ffi.cast("uintptr_t", self._view))
        for index, window in enumerate(self._windows):
            slots.add_at(window.page_gpa, hva + index * layout.PAGE_SIZE, layout.PAGE_SIZE, read_only=True)

    def registers(self, index: int) -> Any:
        """Registers of a device, ``uint32_t *``, valid until ``close``."""
        window = self._windows[index]
        return ffi.cast("uint32_t *", self._view + index * layout.PAGE_SIZE + (window.gpa - window.page_gpa))

    def close(self) -> None:
        """Unmap them. vCPUs and devices have ended."""
        ffi.release(self._view)
        self._pages.close()
