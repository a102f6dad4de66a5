"""The packet header: one copy of guest bytes in, one value out."""

from __future__ import annotations

from typing import NamedTuple

from kvmlite.abi.virtio_vsock import (
    VIRTIO_VSOCK_HDR,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_TYPE_STREAM,
    VMADDR_CID_HOST,
)

HEADER_SIZE = VIRTIO_VSOCK_HDR.size


class Header(NamedTuple):
    """``struct virtio_vsock_hdr`` as numbers; every field is what the guest wrote, unjudged.

    Spec: VIRTIO 1.2, 5.10.6.
    """

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    size: int  # `len`: payload bytes after the header
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Decode exactly ``HEADER_SIZE`` bytes."""
        return cls._make(VIRTIO_VSOCK_HDR.unpack(data))

    def reset(self) -> bytes:
        """Return the RST packet that answers this one: addresses swapped, the same type."""
        return VIRTIO_VSOCK_HDR.pack(
            self.dst_cid,
            self.src_cid,
            self.dst_port,
            self.src_port,
            0,
            self.type,
            VIRTIO_VSOCK_OP_RST,
            0,
            0,
            0,
        )


def pack_header(
    guest_cid: int,
    host_port: int,
    guest_port: int,
    size: int,
    op: int,
    flags: int,
    buf_alloc: int,
    fwd_cnt: int,
) -> bytes:
    """Encode the header of a stream packet from the host (CID 2) to the guest."""
    return VIRTIO_VSOCK_HDR.pack(
        VMADDR_CID_HOST,
        guest_cid,
        host_port,
        guest_port,
        size,
        VIRTIO_VSOCK_TYPE_STREAM,
        op,
        flags,
        buf_alloc,
        fwd_cnt,
    )
