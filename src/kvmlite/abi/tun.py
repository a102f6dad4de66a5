"""TUN/TAP interfaces: ``linux/if_tun.h``."""

from __future__ import annotations

TUN_DEVICE = "/dev/net/tun"

TUNSETIFF = 0x400454CA  # struct ifreq: name and flags
TUNSETOFFLOAD = 0x400454D0  # TUN_F_*, by value
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8  # int: bytes in front of each frame
TUNSETQUEUE = 0x400454D9  # struct ifreq: IFF_ATTACH_QUEUE or IFF_DETACH_QUEUE

IFNAMSIZ = 16

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400

# What the user of a TAP takes besides plain frames.
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_UFO = 0x10
TUN_F_USO4 = 0x20  # since Linux 6.2
TUN_F_USO6 = 0x40
