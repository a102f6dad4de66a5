"""Registers of the MMIO transport, version 2 (VIRTIO 1.2, 4.2.2; names as in ``<linux/virtio_mmio.h>``)."""

from __future__ import annotations

from enum import IntEnum

VIRTIO_MMIO_MAGIC = 0x74726976  # "virt", little-endian
VIRTIO_MMIO_VERSION_2 = 2
VIRTIO_MMIO_INT_VRING = 1
VIRTIO_MMIO_INT_CONFIG = 2

VIRTIO_MMIO_SIZE = 0x1000
"""Bytes of address space one device takes here: the registers, then configuration space up to the end of the page."""


class MmioRegister(IntEnum):
    """Offset of a register. Prefix dropped: ``VIRTIO_MMIO_``. All are le32; CONFIG is where the device's own space starts."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_AVAIL_LOW = 0x090
    QUEUE_AVAIL_HIGH = 0x094
    QUEUE_USED_LOW = 0x0A0
    QUEUE_USED_HIGH = 0x0A4
    SHM_SEL = 0x0AC
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100
