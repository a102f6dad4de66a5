"""A network card with a driver in front and a pair of sockets for what it is plugged into."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from struct import Struct
from typing import Any

from kvmlite import Net
from kvmlite.abi.tun import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN
from kvmlite.testing import VirtioRig
from kvmlite.virtio.device import DeviceResources

LENGTH = Struct(">I")
ALL_OFFLOADS = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN


class FakePort:
    """Packet sockets behave like a TAP's queues: a read or a write is a frame; a stream socket is a stream."""

    def __init__(self, framing: str, fds: tuple[int, ...], **port: Any) -> None:
        self.framing = framing
        self.fds = fds
        self.offloads: int = port.get("offloads", 0)
        self.mac: bytes | None = port.get("mac")
        self.mtu: int | None = port.get("mtu")
        self.egress = port.get("egress")
        self.calls: list[tuple[str, int]] = []
        for fd in fds:
            os.set_blocking(fd, False)

    def set_offloads(self, flags: int) -> None:
        self.calls.append(("offloads", flags))

    def set_queue_pairs(self, count: int) -> None:
        self.calls.append(("pairs", count))

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Plug:
    """A card, its rig, and the host's end of each queue pair. Also the spec's backend."""

    def __init__(
        self, stack: ExitStack, framing: str, queue_pairs: int, port: dict[str, Any], rig: dict[str, Any], **spec: Any
    ) -> None:
        kind = socket.SOCK_STREAM if framing == "stream" else socket.SOCK_SEQPACKET
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(queue_pairs)]
        self.hosts = [stack.enter_context(pair[0]) for pair in pairs]
        for host in self.hosts:
            host.settimeout(30)
        self._ours = tuple(pair[1].detach() for pair in pairs)
        self._framing = framing
        self._port = port
        net = Net(backend=self, queue_pairs=queue_pairs, **spec)
        self.rig = stack.enter_context(VirtioRig(net.attach, **rig))
        self.rx, self.tx = self.rig.queues[:2]

    def open(self, resources: DeviceResources, queue_pairs: int) -> FakePort:
        self.port = FakePort(self._framing, self._ours, **self._port)
        return self.port

    @property
    def host(self) -> socket.socket:
        return self.hosts[0]

    @property
    def device(self) -> Any:
        return self.rig.device

    def deliver(self, data: bytes) -> None:
        """Send from the host's side, and let the card do its work."""
        self.host.sendall(data)
        self.rig.settle()
