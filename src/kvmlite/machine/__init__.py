"""Config to running microVM: the composition root."""

from __future__ import annotations

from kvmlite.machine.config import Kernel, MachineConfig
from kvmlite.machine.machine import Machine

__all__ = ["Kernel", "Machine", "MachineConfig"]
