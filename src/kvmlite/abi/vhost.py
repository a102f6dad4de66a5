"""Devices whose queues the host's kernel serves (names as in ``<linux/vhost.h>``). ``host/vhost.py`` issues the requests."""

from __future__ import annotations

from struct import Struct

VHOST_GET_FEATURES = 0x8008AF00
VHOST_SET_FEATURES = 0x4008AF00
VHOST_SET_OWNER = 0x0000AF01
VHOST_SET_MEM_TABLE = 0x4008AF03
VHOST_SET_VRING_NUM = 0x4008AF10
VHOST_SET_VRING_ADDR = 0x4028AF11
VHOST_SET_VRING_BASE = 0x4008AF12
VHOST_GET_VRING_BASE = 0xC008AF12
VHOST_SET_VRING_KICK = 0x4008AF20
VHOST_SET_VRING_CALL = 0x4008AF21
VHOST_SET_VRING_ERR = 0x4008AF22
VHOST_NET_SET_BACKEND = 0x4008AF30
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
VHOST_VSOCK_SET_RUNNING = 0x4004AF61

VHOST_FILE_UNBIND = -1

VHOST_MEMORY = Struct("<II")
"""``struct vhost_memory``: 0 u32 nregions / 4 u32 padding; then the regions."""

VHOST_MEMORY_REGION = Struct("<QQQQ")
"""``struct vhost_memory_region``: 0 u64 guest_phys_addr / 8 u64 memory_size (bytes) / 16 u64 userspace_addr / 24 u64 0."""

VHOST_VRING_STATE = Struct("<II")
"""``struct vhost_vring_state``: 0 u32 index / 4 u32 num (descriptors, or an index)."""

VHOST_VRING_FILE = Struct("<Ii")
"""``struct vhost_vring_file``: 0 u32 index / 4 s32 fd, or VHOST_FILE_UNBIND."""

VHOST_VRING_ADDR = Struct("<IIQQQQ")
"""``struct vhost_vring_addr``, 40 bytes, addresses in this process's memory.

0 u32 index / 4 u32 flags / 8 u64 desc_user_addr / 16 u64 used_user_addr / 24 u64 avail_user_addr / 32 u64 log_guest_addr.
"""
