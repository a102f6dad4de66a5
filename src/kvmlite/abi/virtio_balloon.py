"""Numbers and layouts of the memory balloon (VIRTIO 1.2, 5.5; names as in ``<linux/virtio_balloon.h>``)."""

from __future__ import annotations

from struct import Struct

# Feature bits, as bit numbers.
VIRTIO_BALLOON_F_MUST_TELL_HOST = 0
VIRTIO_BALLOON_F_STATS_VQ = 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2
VIRTIO_BALLOON_F_FREE_PAGE_HINT = 3
VIRTIO_BALLOON_F_PAGE_POISON = 4
VIRTIO_BALLOON_F_REPORTING = 5

INFLATE_QUEUE = 0
DEFLATE_QUEUE = 1
STATS_QUEUE = 2

VIRTIO_BALLOON_PFN_SHIFT = 12

# Tags of the statistics (5.5.6.4). Memory in bytes, the others are counts.
VIRTIO_BALLOON_S_SWAP_IN = 0
VIRTIO_BALLOON_S_SWAP_OUT = 1
VIRTIO_BALLOON_S_MAJFLT = 2
VIRTIO_BALLOON_S_MINFLT = 3
VIRTIO_BALLOON_S_MEMFREE = 4
VIRTIO_BALLOON_S_MEMTOT = 5
VIRTIO_BALLOON_S_AVAIL = 6
VIRTIO_BALLOON_S_CACHES = 7
VIRTIO_BALLOON_S_HTLB_PGALLOC = 8
VIRTIO_BALLOON_S_HTLB_PGFAIL = 9

VIRTIO_BALLOON_CONFIG = Struct("<IIII")
"""``struct virtio_balloon_config``, 16 bytes.

0 le32 num_pages (4 KiB pages the host wants) / 4 le32 actual (pages it has; the driver writes it) / 8 le32
free_page_hint_cmd_id / 12 le32 poison_val (the driver writes it)
"""

VIRTIO_BALLOON_STAT = Struct("<HQ")
"""``struct virtio_balloon_stat``, 10 bytes, packed: 0 le16 tag / 2 le64 val."""
