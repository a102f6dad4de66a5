"""How much a card may carry: token buckets (``bucket.h``), one pair for each direction, shared by its queue pairs."""

from __future__ import annotations

from kvmlite._native import ffi, lib
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_RATE = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """As in ``Net``; zeros: none."""

    bandwidth: int = 0
    packets: int = 0
    burst_s: float = 1.0

    def __bool__(self) -> bool:
        return bool(self.bandwidth or self.packets)

    def make(self) -> Any:
        """``struct kvl_limiter *`` for one direction, full; NULL if nothing is limited."""
        if not self:
            return ffi.NULL
        limiter = ffi.new("struct kvl_limiter *")
        lib.kvl_limiter_init(limiter)
        for bucket, rate in ((limiter.bytes, self.bandwidth), (limiter.operations, self.packets)):
            capped = min(rate, _MAX_RATE)
            lib.kvl_bucket_init(ffi.addressof(bucket), capped, int(capped * self.burst_s), lib.kvl_monotonic_ns())
        return limiter
