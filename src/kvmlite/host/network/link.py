"""A guest's way into the host's network, opened: where its frames travel, and the addresses that fit."""

from __future__ import annotations

from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    import contextlib
    import socket
    from collections.abc import Callable
    from typing import Any, Protocol

    from kvmlite.host.daemon import Daemon, Loop
    from kvmlite.host.tap import Tap

    class Link(Protocol):
        """Where a guest's frames go. A record; what it opens belongs to the ``OpenLink``."""

        @property
        def serves_card(self) -> bool:
            """Whether the program behind it can serve a card's queues itself, here and now."""

        def open(self, surroundings: Surroundings) -> OpenLink:
            """Open it.

            Raises:
                ConfigError: It is not possible in this combination.
                HostError: The host refuses. Nothing is left behind.
            """


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a link is opened for.

    Attributes:
        device: How messages call the device.
        queue_pairs: Of a TAP, how many descriptors.
        loop: Where helper processes are watched.
        warn: Tells the user of something that does not end the guest.
        serves_card: The program behind the link is to serve the card's queues itself (vhost-user).
    """

    device: str
    queue_pairs: int
    loop: Loop
    warn: Callable[[str], None]
    serves_card: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAddresses:
    """What the guest's interface is to be told; all empty if a DHCP server shall do it.

    Attributes:
        address: IPv4 or IPv6, with its prefix: ``10.0.2.15/24``.
        gateway: Of all routes.
        nameservers: For ``/etc/resolv.conf``.
        reachable: Networks that get a route through the gateway; None: all, by the default route. A destination that is
            refused anyway fails at once when there is no route to it.
    """

    address: str = ""
    gateway: str = ""
    nameservers: tuple[str, ...] = ()
    reachable: tuple[str, ...] | None = None


class OpenLink:
    """What frames travel over, and what is behind it.

    Args:
        tap: Frames come and go behind a ``virtio_net_hdr_v1``; or
        stream: a stream socket on which they come behind their length in 32 big-endian bits; or
        back_end: starts the program that serves the card's queues itself, and returns it with a vhost-user connection; both
            are the caller's.
        guest: Addresses that fit.
        behind: What is given back by ``close``, after those.
        egress: ``struct kvl_egress *`` that whoever carries the frames has to ask; None if nobody has to.
        mtu: Largest packet in bytes, if not 1500.
    """

    def __init__(
        self,
        *,
        guest: GuestAddresses,
        tap: Tap | None = None,
        stream: socket.socket | None = None,
        back_end: Callable[[], tuple[Daemon, socket.socket]] | None = None,
        behind: contextlib.ExitStack | None = None,
        egress: Any = None,
        mtu: int | None = None,
    ) -> None:
        self.tap = tap
        self.stream = stream
        self.back_end = back_end
        self.guest = guest
        self.egress = egress
        self.mtu = mtu
        self._behind = behind

    def close(self) -> None:
        """Close the TAP or the stream, if nobody has, and give back what is behind it. Twice is harmless.

        Raises:
            HostError: Something on the host could not be put back; all else was.
        """
        if self.tap is not None:
            self.tap.close()
        if self.stream is not None:
            self.stream.close()
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.close()
