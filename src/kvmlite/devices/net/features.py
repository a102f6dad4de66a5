"""Which features go with which offloads of the host, both ways (VIRTIO 1.2, 5.1.3)."""

from __future__ import annotations

from kvmlite.abi.tun import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO4, TUN_F_USO6
from kvmlite.abi.virtio_net import (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
)

# (feature of the driver, what the TAP may then hand it); all but the first need GUEST_CSUM.
_GUEST = (
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
)
# (offload of the TAP, features of frames it takes)
_HOST = (
    (TUN_F_CSUM, (VIRTIO_NET_F_CSUM,)),
    (TUN_F_TSO4, (VIRTIO_NET_F_HOST_TSO4,)),
    (TUN_F_TSO6, (VIRTIO_NET_F_HOST_TSO6,)),
    (TUN_F_TSO_ECN, (VIRTIO_NET_F_HOST_ECN,)),
    (TUN_F_USO4, (VIRTIO_NET_F_HOST_USO,)),
)
_LARGE = TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6


def bits(*numbers: int) -> int:
    """A feature mask."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def has(features: int, number: int) -> bool:
    """Whether a feature is among these."""
    return bool(features >> number & 1)


def offered(offloads: int, *, queue_pairs: int, has_mtu: bool, has_valid_sums: bool = False) -> int:
    """What a card offers whose host takes and gives frames with these ``TUN_F_*``."""
    features = bits(VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF)
    if has_valid_sums:
        features |= bits(VIRTIO_NET_F_GUEST_CSUM)
    for flag, numbers in _HOST:
        if offloads & flag:
            features |= bits(*numbers)
    for number, flag in _GUEST:
        if offloads & flag:
            features |= bits(number)
    if offloads:
        features |= bits(VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    if queue_pairs > 1:
        features |= bits(VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ)
    if has_mtu:
        features |= bits(VIRTIO_NET_F_MTU)
    return features


def tap_offloads(driver_features: int) -> int:
    """``TUN_F_*`` for what the driver takes; without GUEST_CSUM nothing else makes sense (5.1.3.1)."""
    if not has(driver_features, VIRTIO_NET_F_GUEST_CSUM):
        return 0
    flags = 0
    for number, flag in _GUEST:
        if has(driver_features, number):
            flags |= flag
    if not flags & (TUN_F_TSO4 | TUN_F_TSO6):
        flags &= ~TUN_F_TSO_ECN
    if flags & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6:
        flags &= ~(TUN_F_USO4 | TUN_F_USO6)  # the kernel has both or none
    return flags


def guest_offload_mask(driver_features: int) -> int:
    """The offloads that CTRL_GUEST_OFFLOADS may switch: those that were negotiated (5.1.6.5.6)."""
    return driver_features & bits(*(number for number, _ in _GUEST))


def may_receive_large(offloads: int) -> bool:
    """Whether frames of 64 KiB may come with these ``TUN_F_*``."""
    return bool(offloads & _LARGE)
