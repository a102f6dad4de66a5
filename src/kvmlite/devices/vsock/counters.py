"""What the device counts, and the snapshot it shows."""

from __future__ import annotations

from kvmlite.records import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockStatistics:
    """Counters since the device was made (``connections``: now). Guest to host is ``in``, the other way ``out``."""

    connections: int
    connections_opened: int
    packets_in: int
    packets_out: int
    bytes_in: int
    bytes_out: int
    resets_in: int
    resets_out: int
    malformed: int
    credit_stalls: int
    buffer_stalls: int
    unsent_bytes: int


class Counters:
    """Running totals.

    Thread: written by the device loop only; any thread may read (each value is one int).
    """

    __slots__ = (
        "buffer_stalls",
        "bytes_in",
        "bytes_out",
        "connections_opened",
        "credit_stalls",
        "malformed",
        "packets_in",
        "packets_out",
        "resets_in",
        "resets_out",
    )

    def __init__(self) -> None:
        self.packets_in = self.packets_out = 0
        self.bytes_in = self.bytes_out = 0
        self.resets_in = self.resets_out = 0
        self.connections_opened = 0
        self.malformed = 0  # packets whose chain contradicts them, and chains no packet fits in
        self.credit_stalls = 0  # the guest had no room for host bytes
        self.buffer_stalls = 0  # the driver had no buffers in the rx queue
