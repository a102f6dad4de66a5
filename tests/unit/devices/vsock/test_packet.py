"""The packet header and the spec record."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from kvmlite.abi import virtio_vsock as abi
from kvmlite.devices.vsock import Vsock
from kvmlite.devices.vsock.packet import HEADER_SIZE, Header, pack_header
from kvmlite.errors import ConfigError

WIRE = bytes.fromhex(
    "0300000000000000" "0200000000000000" "e8030000" "05000000"
    "07000000" "0100" "0500" "04030201" "00000100" "44332211"
)  # fmt: skip


def test_header_is_44_bytes_little_endian():
    assert HEADER_SIZE == 44
    assert Header.unpack(WIRE) == (3, 2, 1000, 5, 7, 1, 5, 0x01020304, 65536, 0x11223344)


def test_pack_header_writes_the_host_as_source():
    assert pack_header(7, 5, 1000, 7, 5, 0x01020304, 65536, 0x11223344) == (
        struct.pack("<QQII", 2, 7, 5, 1000) + WIRE[24:]
    )


def test_reset_answers_with_the_same_type_and_swapped_addresses():
    odd = Header(3, 99, 1000, 5, 7, 2, 5, 1, 2, 3)
    assert odd.reset() == struct.pack("<QQIIIHHIII", 99, 3, 5, 1000, 0, 2, 3, 0, 0, 0)


def test_numbers_are_those_of_the_kernel_header():
    path = Path("/usr/include/linux/virtio_vsock.h")
    found = dict(re.findall(r"\b(VIRTIO_VSOCK_(?:OP|TYPE|F|SHUTDOWN|EVENT)_\w+)\s*=?\s*(\d+)", path.read_text()))
    assert len(found) >= 13
    ours = {name: value for name, value in vars(abi).items() if name in found}
    assert ours == {name: int(value) for name, value in found.items()}


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 0xFFFFFFFF, 1 << 32])
def test_spec_refuses_reserved_cids(cid):
    with pytest.raises(ConfigError, match=f"cid {cid} is not in 3..4294967294"):
        Vsock(cid=cid)


def test_spec_refuses_a_path_too_long_for_a_socket_with_its_port():
    assert Vsock(uds_path="/" + "x" * 95).cid is None
    with pytest.raises(ConfigError, match="97 bytes long, allowed are 1 to 96"):
        Vsock(uds_path="/" + "x" * 96)
    with pytest.raises(ConfigError, match="0 bytes"):
        Vsock(uds_path="")
