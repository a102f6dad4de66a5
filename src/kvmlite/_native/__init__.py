"""The C data plane: ``ffi`` and ``lib`` of the compiled module, and nothing else.

C opens nothing, parses no text, logs nothing and never calls Python. Calls release the GIL.
"""

from __future__ import annotations

from kvmlite._native._kvl import ffi, lib

__all__ = ["ffi", "lib"]
