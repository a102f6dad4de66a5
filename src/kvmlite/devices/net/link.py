"""A network card on one of the links of ``host.network``: user networking, NAT, a bridge, a TAP."""

from __future__ import annotations

from kvmlite.errors import HostError, StateError
from kvmlite.host.network.link import Surroundings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.devices.net import NetPort
    from kvmlite.host.network.link import GuestAddresses, Link
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

    def open(self, resources: DeviceResources, queue_pairs: int) -> NetPort:
        """See ``NetBackend``.

        Raises:
            StateError: Another card has it.
        """
        from kvmlite.devices.net.ports import StreamPort, TapPort

        if self._guest is not None:
            raise StateError(f"{resources.name}: a network is one guest's at a time; make one for each guest")
        opened = self._link.open(
            Surroundings(device=resources.name, queue_pairs=queue_pairs, loop=resources.loop, warn=resources.warn)
        )

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
                port = StreamPort(fd, mac=self._mac, mtu=opened.mtu, egress=opened.egress, on_close=give_back)
        except BaseException:
            give_back()
            raise
        self._guest = opened.guest
        return port
