"""A network card on one of the links of ``host.network``: user networking, NAT, a bridge, a TAP."""

from __future__ import annotations

from kvmlite.errors import HostError, StateError
from kvmlite.host.network.link import Surroundings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.devices.net import NetPort
    from kvmlite.devices.vhost_user import VhostUserDevice
    from kvmlite.host.network.link import GuestAddresses, Link, OpenLink
    from kvmlite.virtio.device import DeviceResources


class LinkBackend:
    """A link as the backend of one card at a time.

    Args:
        link: Opened when the card is made, and given back with it.
        mac: Address of the card; None for a random one.

    Thread: the machine's.
    """

    def __init__(self, link: Link, *, mac: bytes | None = None) -> None:
        self._link = link
        self._mac = mac
        self._guest: GuestAddresses | None = None

    @property
    def guest(self) -> GuestAddresses:
        """What the guest's interface is to be told.

        Raises:
            StateError: The card has not been made.
        """
        if self._guest is None:
            raise StateError("the network card has not been made yet")
        return self._guest

    @property
    def needs_shared_memory(self) -> bool:
        """See ``ElsewhereBackend``."""
        return self._link.serves_card

    def make_device(self, resources: DeviceResources, *, mac: bytes | None, mtu: int | None) -> VhostUserDevice:
        """See ``ElsewhereBackend``.

        Raises:
            StateError: Another card has it.
        """
        from kvmlite.devices.net.device import random_mac
        from kvmlite.devices.net.vhost_user import make_vhost_user_net

        opened = self._open(resources, 1, serves_card=True)
        assert opened.back_end is not None
        device = make_vhost_user_net(
            resources,
            opened.back_end,
            mac=mac or self._mac or random_mac(),
            mtu=mtu or opened.mtu,
            reason="the guest's connections were lost with it",
        )
        self._guest = opened.guest
        return device

    def _open(self, resources: DeviceResources, queue_pairs: int, *, serves_card: bool) -> OpenLink:
        if self._guest is not None:
            raise StateError(f"{resources.name}: a network is one guest's at a time; make one for each guest")
        return self._link.open(
            Surroundings(
                device=resources.name,
                queue_pairs=queue_pairs,
                loop=resources.loop,
                warn=resources.warn,
                serves_card=serves_card,
            )
        )

    def open(self, resources: DeviceResources, queue_pairs: int) -> NetPort:
        """See ``NetBackend``.

        Raises:
            StateError: Another card has it.
        """
        from kvmlite.devices.net.ports import StreamPort, TapPort

        opened = self._open(resources, queue_pairs, serves_card=False)

        def give_back() -> None:
            self._guest = None
            try:
                opened.close()
            except HostError as error:
                resources.warn(f"{resources.name}: {error}; it is put back when the next guest with NAT starts")

        try:
            port: NetPort
            if opened.tap is not None:
                port = TapPort(opened.tap, mac=self._mac, mtu=opened.mtu, egress=opened.egress, on_close=give_back)
            else:
                assert opened.stream is not None
                fd = opened.stream.detach()
                port = StreamPort(
                    fd,
                    mac=self._mac,
                    mtu=opened.mtu,
                    egress=opened.egress,
                    on_close=give_back,
                    has_valid_sums=True,  # passt takes bytes out of the host's sockets and makes frames of them
                )
        except BaseException:
            give_back()
            raise
        self._guest = opened.guest
        return port
