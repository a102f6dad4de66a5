"""How a guest starts: bytes in, guest memory out, and the state the first vCPU must have. Never touches KVM."""

from __future__ import annotations

from kvmlite.boot.entry import EntryState
from kvmlite.boot.image import KernelImage, open_kernel
from kvmlite.boot.load import load_kernel

__all__ = ["EntryState", "KernelImage", "load_kernel", "open_kernel"]
