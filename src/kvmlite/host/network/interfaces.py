"""Interfaces of the host: up, addresses, MTU, bridges and their VLANs, by rtnetlink (pyroute2)."""

from __future__ import annotations

import errno
import os

from kvmlite.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

_NOT_PERMITTED = "run as root (CAP_NET_ADMIN), or use --net user, which needs no rights"


class Interfaces:
    """A connection to rtnetlink in this thread's network namespace; a context manager.

    Errors of the kernel are raised as ``HostError``.
    """

    def __init__(self) -> None:
        from pyroute2 import IPRoute

        self._route = IPRoute()

    def __enter__(self) -> Interfaces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._route.close()

    def raise_up(self, name: str, *, mtu: int = 0) -> None:
        """Set an interface up; ``mtu`` in bytes, 0 to leave it."""
        self._ask("link", "set", name, **({"mtu": mtu} if mtu else {}), state="up")

    def add_address(self, name: str, address: str, prefix_size: int) -> None:
        """Give an interface an address, and with it the route to its network."""
        self._ask("addr", "add", name, address=address, prefixlen=prefix_size)

    def join_bridge(self, name: str, bridge: str) -> None:
        """Make an interface a port of a bridge."""
        self._ask("link", "set", name, master=self.index(bridge))

    def set_vlan(self, name: str, vlan: int) -> None:
        """Put a bridge's port into a VLAN and no other: its frames carry no tag outside the bridge."""
        info = {"vid": vlan, "flags": ["pvid", "untagged"]}
        self._ask("vlan_filter", "add", name, vlan_info=info)
        if vlan != 1:
            self._ask("vlan_filter", "del", name, vlan_info={"vid": 1})

    def bridge_filters_vlans(self, name: str) -> bool | None:
        """Whether a bridge keeps VLANs apart; None if the interface is no bridge."""
        link = self._call(name, lambda: self._route.link("get", index=self.index(name)))[0]
        about = link.get_attr("IFLA_LINKINFO")
        if about is None or about.get_attr("IFLA_INFO_KIND") != "bridge":
            return None
        return bool(about.get_attr("IFLA_INFO_DATA").get_attr("IFLA_BR_VLAN_FILTERING"))

    def index(self, name: str) -> int:
        """Number of an interface."""
        found: list[int] = self._call(name, lambda: self._route.link_lookup(ifname=name))
        if not found:
            raise HostError(f"there is no interface {name}", errno.ENODEV)
        return found[0]

    def _ask(self, request: str, verb: str, interface: str, /, **fields: Any) -> None:
        index = self.index(interface)
        self._call(interface, lambda: getattr(self._route, request)(verb, index=index, **fields))

    def _call(self, name: str, function: Any) -> Any:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            return function()
        except NetlinkError as error:
            code = abs(error.code)
            raise HostError(
                f"{name}: {os.strerror(code)}", code, hint=_NOT_PERMITTED if code == errno.EPERM else ""
            ) from error
