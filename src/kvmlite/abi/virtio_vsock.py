"""Numbers and layouts of the socket device (VIRTIO 1.2, 5.10; names as in ``<linux/virtio_vsock.h>``).

Plain integers rather than enums: each packet compares several of them.
"""

from __future__ import annotations

from struct import Struct

VIRTIO_ID_VSOCK = 19

RX_QUEUE = 0  # device to driver
TX_QUEUE = 1  # driver to device
EVENT_QUEUE = 2

VIRTIO_VSOCK_F_SEQPACKET = 1  # bit number

VIRTIO_VSOCK_TYPE_STREAM = 1
VIRTIO_VSOCK_TYPE_SEQPACKET = 2

VIRTIO_VSOCK_OP_INVALID = 0
VIRTIO_VSOCK_OP_REQUEST = 1
VIRTIO_VSOCK_OP_RESPONSE = 2
VIRTIO_VSOCK_OP_RST = 3
VIRTIO_VSOCK_OP_SHUTDOWN = 4
VIRTIO_VSOCK_OP_RW = 5
VIRTIO_VSOCK_OP_CREDIT_UPDATE = 6
VIRTIO_VSOCK_OP_CREDIT_REQUEST = 7

# Flags of VIRTIO_VSOCK_OP_SHUTDOWN: what the sender of the packet will not do any more.
VIRTIO_VSOCK_SHUTDOWN_RCV = 1
VIRTIO_VSOCK_SHUTDOWN_SEND = 2
VIRTIO_VSOCK_SHUTDOWN_BOTH = 3

VIRTIO_VSOCK_EVENT_TRANSPORT_RESET = 0

VMADDR_CID_HYPERVISOR = 0
VMADDR_CID_LOCAL = 1
VMADDR_CID_HOST = 2
VMADDR_CID_ANY = 0xFFFFFFFF
VMADDR_PORT_ANY = 0xFFFFFFFF

VIRTIO_VSOCK_CONFIG = Struct("<Q")
"""``struct virtio_vsock_config``: 0 le64 guest_cid (upper 32 bits zero)."""

VIRTIO_VSOCK_EVENT = Struct("<I")
"""``struct virtio_vsock_event``: 0 le32 id."""

VIRTIO_VSOCK_HDR = Struct("<QQIIIHHIII")
"""``struct virtio_vsock_hdr``, 44 bytes, packed.

0 le64 src_cid / 8 le64 dst_cid / 16 le32 src_port / 20 le32 dst_port / 24 le32 len (bytes after the
header) / 28 le16 type / 30 le16 op / 32 le32 flags / 36 le32 buf_alloc (bytes) / 40 le32 fwd_cnt
(bytes, wraps).
"""
