"""Numbers and layouts of the block device (VIRTIO 1.2, 5.2; names as in ``<linux/virtio_blk.h>``)."""

from __future__ import annotations

from struct import Struct

# Feature bits, as bit numbers (5.2.3).
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_TOPOLOGY = 10
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14

# Request types (5.2.6).
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13

VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

VIRTIO_BLK_ID_BYTES = 20

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

SECTOR_SIZE = 512
"""Bytes of the unit of every address and capacity, whatever the block size."""

VIRTIO_BLK_CONFIG = Struct("<QIIHBBIBBHIBBHIIIIIB3x")
"""``struct virtio_blk_config`` up to write-zeroes, 60 bytes.

0 le64 capacity (sectors) / 8 le32 size_max (bytes) / 12 le32 seg_max (descriptors) / 16 le16 cylinders / 18 u8 heads /
19 u8 sectors / 20 le32 blk_size (bytes) / 24 u8 physical_block_exp / 25 u8 alignment_offset / 26 le16 min_io_size
(blocks) / 28 le32 opt_io_size (blocks) / 32 u8 wce / 33 u8 / 34 le16 num_queues / 36 le32 max_discard_sectors / 40 le32
max_discard_seg / 44 le32 discard_sector_alignment / 48 le32 max_write_zeroes_sectors / 52 le32 max_write_zeroes_seg /
56 u8 write_zeroes_may_unmap / 57 3 bytes.
"""

VIRTIO_BLK_OUTHDR = Struct("<IIQ")
"""``struct virtio_blk_outhdr``, 16 bytes: 0 le32 type / 4 le32 ioprio / 8 le64 sector."""

VIRTIO_BLK_DISCARD_WRITE_ZEROES = Struct("<QII")
"""``struct virtio_blk_discard_write_zeroes``, 16 bytes: 0 le64 sector / 8 le32 num_sectors / 12 le32 flags."""
