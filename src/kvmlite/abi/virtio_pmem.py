"""Numbers and layouts of the persistent memory device (VIRTIO 1.2, 5.19; names as in ``<linux/virtio_pmem.h>``)."""

from __future__ import annotations

from struct import Struct

VIRTIO_PMEM_REQ_TYPE_FLUSH = 0

PMEM_RESP_OK = 0
PMEM_RESP_EIO = 1  # any other value than 0 is a failure

VIRTIO_PMEM_CONFIG = Struct("<QQ")
"""``struct virtio_pmem_config``: 0 le64 start (GPA) / 8 le64 size (bytes)."""

VIRTIO_PMEM_REQ = Struct("<I")
"""``struct virtio_pmem_req``: 0 le32 type."""

VIRTIO_PMEM_RESP = Struct("<I")
"""``struct virtio_pmem_resp``: 0 le32 ret."""
