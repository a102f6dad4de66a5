"""Numbers and layouts of the file system device (VIRTIO 1.2, 5.11) and of the FUSE messages in its queues (<linux/fuse.h>)."""

from __future__ import annotations

from struct import Struct

VIRTIO_FS_TAG_SIZE = 36

VIRTIO_FS_CONFIG = Struct("<36sI")
"""0 u8[36] tag, padded with zeros / 36 le32 number of request queues."""

FUSE_IN_HEADER = Struct("<IIQQIIIHH")
"""0 u32 size / 4 u32 opcode / 8 u64 unique / 16 u64 nodeid / 24 u32 uid / 28 u32 gid / 32 u32 pid / 36 u16 extensions / 38 u16."""

FUSE_OUT_HEADER = Struct("<IiQ")
"""0 u32 size / 4 s32 error, negative / 8 u64 unique, of the request that is answered."""
