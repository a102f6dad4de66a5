"""The guest of ``scripts/bench net`` in kvmlite: ``net_machine.py KERNEL [INITRD] CMDLINE CPUS (TAP VHOST | user PORT:PORT...)``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvmlite import Kernel, Machine, MachineConfig, Net
from kvmlite.devices.net.link import LinkBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.host.network.link import Link

MAC = b"\x52\x54\x00\x12\x34\x56"


def make_net(arguments: Sequence[str]) -> Net:
    """The card: on an existing TAP, or on passt."""
    from kvmlite.host.network.passt import UserLink
    from kvmlite.host.network.publish import parse_publish
    from kvmlite.host.network.tap_link import TapLink

    link: Link
    if arguments[0] == "user":
        link = UserLink(mac=MAC, publishes=tuple(parse_publish(text) for text in arguments[1:]))
        return Net(backend=LinkBackend(link, mac=MAC))
    link = TapLink(name=arguments[0])
    return Net(backend=LinkBackend(link, mac=MAC), vhost=arguments[1])


def main() -> None:
    """Run until the guest ends, or somebody ends this process."""
    kernel, initrd, cmdline, cpus, *network = sys.argv[1:]
    config = MachineConfig(
        kernel=Kernel(path=kernel, initrd=(initrd,) if initrd else (), cmdline=cmdline),
        memory_mib=512,
        vcpu_count=int(cpus),
        devices=(make_net(network),),
        console_fd=1,
    )
    with Machine(config) as machine:
        machine.start()
        machine.wait()


if __name__ == "__main__":
    main()
