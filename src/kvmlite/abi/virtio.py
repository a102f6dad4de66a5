"""Numbers and layouts every virtio device shares (VIRTIO 1.2, chapters 2 and 5).

Names as in ``<linux/virtio_config.h>``, ``<linux/virtio_ids.h>`` and ``<linux/virtio_ring.h>``.
"""

from __future__ import annotations

from enum import IntFlag
from struct import Struct


class DeviceStatus(IntFlag):
    """Device status field (2.1). Prefix dropped: ``VIRTIO_CONFIG_S_``."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 0x40
    FAILED = 0x80


# Feature bits (2.2, chapter 6), as bit numbers.
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_RING_RESET = 40

# Device types (chapter 5).
VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_CONSOLE = 3
VIRTIO_ID_RNG = 4
VIRTIO_ID_BALLOON = 5
VIRTIO_ID_FS = 26
VIRTIO_ID_PMEM = 27

# Split virtqueues (2.7).
VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4
VRING_USED_F_NO_NOTIFY = 1
VRING_AVAIL_F_NO_INTERRUPT = 1

VRING_DESC = Struct("<QIHH")
"""``struct vring_desc``: 0 le64 addr (GPA) / 8 le32 len (bytes) / 12 le16 flags / 14 le16 next."""

VRING_USED_ELEM = Struct("<II")
"""``struct vring_used_elem``: 0 le32 id (head of the chain) / 4 le32 len (bytes written)."""
