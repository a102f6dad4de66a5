"""Guest RAM."""

from __future__ import annotations

from kvmlite.memory.guest_memory import GuestMemory, GuestMemoryError, MemoryRegion

__all__ = ["GuestMemory", "GuestMemoryError", "MemoryRegion"]
