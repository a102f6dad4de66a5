"""Numbers and layouts of vhost-user (QEMU, docs/interop/vhost-user: names as there; the back end's end of it is libvhost-user).

All fields have the host's byte order, which is little-endian here.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

HEADER = Struct("<III")
"""0 u32 request / 4 u32 flags / 8 u32 size of the payload."""

VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

MAX_FDS = 8
MAX_REGIONS = 8

VHOST_USER_F_PROTOCOL_FEATURES = 30
"""Feature bit that no driver sees: the back end knows protocol features."""


class Request(IntEnum):
    """What the front end asks. Prefix dropped: ``VHOST_USER_``."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32


class ProtocolFeature(IntEnum):
    """Bit numbers of the protocol features that are used here. Prefix dropped: ``VHOST_USER_PROTOCOL_F_``."""

    MQ = 0
    REPLY_ACK = 3
    CONFIG = 9
    INFLIGHT_SHMFD = 12


U64 = Struct("<Q")

MEMORY_HEADER = Struct("<II")
"""0 u32 number of regions / 4 u32 padding; then so many of ``MEMORY_REGION``."""

MEMORY_REGION = Struct("<QQQQ")
"""0 u64 guest address / 8 u64 size / 16 u64 user address / 24 u64 offset in its descriptor."""

VRING_STATE = Struct("<II")
"""0 u32 queue / 4 u32 number."""

VRING_ADDR = Struct("<IIQQQQ")
"""0 u32 queue / 4 u32 flags / 8 u64 descriptors / 16 u64 used ring / 24 u64 available ring / 32 u64 log: user addresses."""

CONFIG_HEADER = Struct("<III")
"""0 u32 offset / 4 u32 size / 8 u32 flags; then the bytes."""

INFLIGHT = Struct("<QQHH4x")
"""0 u64 size of the area / 8 u64 its offset in the descriptor / 16 u16 queues / 18 u16 size of a queue."""
