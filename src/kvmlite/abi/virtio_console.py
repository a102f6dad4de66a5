"""Numbers and layouts of the console device (VIRTIO 1.2, 5.3; names as in ``<linux/virtio_console.h>``)."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

# Feature bits, as bit numbers.
VIRTIO_CONSOLE_F_SIZE = 0
VIRTIO_CONSOLE_F_MULTIPORT = 1
VIRTIO_CONSOLE_F_EMERG_WRITE = 2

# Queues: port 0 has 0 and 1, the control messages 2 and 3, port n > 0 has 2n+2 and 2n+3.
CONTROL_RX_QUEUE = 2
CONTROL_TX_QUEUE = 3

VIRTIO_CONSOLE_CONFIG = Struct("<HHII")
"""``struct virtio_console_config``, 12 bytes.

0 le16 cols (characters) / 2 le16 rows (characters) / 4 le32 max_nr_ports / 8 le32 emerg_wr (write only)
"""

VIRTIO_CONSOLE_CONTROL = Struct("<IHH")
"""``struct virtio_console_control``, 8 bytes: 0 le32 id (port) / 4 le16 event / 6 le16 value."""

VIRTIO_CONSOLE_RESIZE_SIZE = Struct("<HH")
"""What follows the header of a RESIZE message: 0 le16 cols / 2 le16 rows (characters).

Linux before its commit 5326ab737a47 (Debian's 6.1.192 has it) takes them the other way round.
"""


class ConsoleEvent(IntEnum):
    """Event of a control message (5.3.6.2). Prefix dropped: ``VIRTIO_CONSOLE_``."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7
