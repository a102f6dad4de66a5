"""A network card whose queues the program at its other end serves itself (vhost-user), as newer releases of passt do."""

from __future__ import annotations

from kvmlite.abi.virtio import VIRTIO_ID_NET
from kvmlite.abi.virtio_net import (
    VIRTIO_NET_CONFIG,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
)
from kvmlite.devices.net.device import DEFAULT_MTU, QUEUE_SIZE
from kvmlite.devices.net.features import bits
from kvmlite.devices.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kvmlite.devices.vhost_user import BackEnd
    from kvmlite.virtio.device import DeviceResources
    from kvmlite.virtio.queue import DescriptorChain

RX_QUEUE = 0

_PASSED_ON = bits(
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF,
)  # fmt: skip
_OWN = bits(VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS)


def make_vhost_user_net(
    resources: DeviceResources,
    start: Callable[[], tuple[BackEnd, socket.socket]],
    *,
    mac: bytes,
    mtu: int | None,
    reason: str,
) -> VhostUserDevice:
    """Make a card with one queue pair and no control queue (VIRTIO 1.2, 5.1).

    If the back end dies the carrier is gone, and what the guest sends is dropped.

    Args:
        resources: The machine's.
        start: As for ``VhostUserDevice``.
        mac: Of the card.
        mtu: What to tell the driver; None: 1500.
        reason: Why a new back end could not go on where the one before ended.

    Raises:
        ConfigError: Guest memory cannot be shared.
        HostError: The back end cannot be started, or is none of a network card.
    """
    up, down = (VIRTIO_NET_CONFIG.pack(mac, status, 1, mtu or DEFAULT_MTU) for status in (VIRTIO_NET_S_LINK_UP, 0))
    return VhostUserDevice(
        resources,
        start,
        device_id=VIRTIO_ID_NET,
        queue_sizes=(QUEUE_SIZE, QUEUE_SIZE),
        features=_PASSED_ON,
        own_features=_OWN,
        config=up,
        fail=_drop,
        unanswered=frozenset((RX_QUEUE,)),
        lost_with_it=reason,
        lost_config=down,
        lost_text="the guest has no network from now on",
        in_order=True,
    )


def _drop(chain: DescriptorChain) -> int:
    """A frame that nobody carries any more."""
    return 0
