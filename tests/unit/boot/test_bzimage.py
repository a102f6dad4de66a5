from __future__ import annotations

import struct

import pytest

from kvmlite.boot import open_kernel
from kvmlite.errors import ImageError


def patched(data: bytes, offset: int, shape: str, value: int) -> bytes:
    copy = bytearray(data)
    struct.pack_into(shape, copy, offset, value)
    return bytes(copy)


def test_setup_header_says_where_everything_is(save, build):
    payload = build.gzip_payload(b"x" * 1000)
    with open_kernel(save(build.bzimage(payload))) as image:
        found = image.bzimage
    assert (found.code_offset, found.payload_offset, found.payload_size) == (
        1024,
        1024 + 0x400,
        len(payload),
    )
    assert (found.cmdline_size, found.initrd_addr_max) == (2047, 0x7FFFFFFF)
    assert (found.pref_address, found.init_size, found.is_relocatable) == (
        0x1000000,
        0x100000,
        True,
    )
    assert len(found.header) == 0x26C - 0x1F1
    assert found.header[0x11:0x15] == b"HdrS"


def test_zero_setup_sectors_mean_four(save, build):
    with open_kernel(save(build.bzimage(setup_sects=0))) as image:
        assert image.bzimage.code_offset == 5 * 512


def test_old_kernel_without_payload_fields_is_accepted(save, build):
    with open_kernel(save(patched(build.bzimage(), 0x24C, "<I", 0))) as image:
        assert image.bzimage.payload_size == 0


MALFORMED = [
    ("no boot flag", 0x1FE, "<H", 0, "without the boot flag"),
    (
        "protocol 2.11",
        0x206,
        "<H",
        0x020B,
        "is a 32-bit Linux kernel .boot protocol 2.11, no 64-bit entry",
    ),
    ("no 64-bit entry", 0x236, "<H", 0x3E, "is a 32-bit Linux kernel"),
    ("header of 0 bytes", 0x201, "<B", 0, "setup header ends at 0x202"),
    ("header of 255 bytes", 0x201, "<B", 255, "setup header ends at 0x301"),
    ("255 setup sectors", 0x1F1, "<B", 255, "truncated bzImage: its code ends at byte"),
    (
        "code of 2^32-1 paragraphs",
        0x1F4,
        "<I",
        2**32 - 1,
        "truncated bzImage: its code ends at byte 68719477744",
    ),
    ("no code", 0x1F4, "<I", 0, "with 0 bytes of protected-mode code"),
    ("code without its entry", 0x1F4, "<I", 32, "with 512 bytes of protected-mode code"),
    ("payload at 2^32-1", 0x248, "<I", 2**32 - 1, "truncated bzImage: its payload ends at byte"),
    (
        "payload of 2^32-1 bytes",
        0x24C,
        "<I",
        2**32 - 1,
        "truncated bzImage: its payload ends at byte",
    ),
    ("payload of 4 bytes", 0x24C, "<I", 4, "with a payload of 4 bytes"),
    ("runs at 0", 0x258, "<Q", 0, "wants to run at 0x0"),
    ("runs at 2^64-1", 0x258, "<Q", 2**64 - 1, "wants to run at 0xffffffffffffffff"),
    ("runs off a page", 0x258, "<Q", 0x1000001, "wants to run at 0x1000001"),
    ("needs less than itself", 0x260, "<I", 1, "says it needs 1 bytes of RAM"),
]


@pytest.mark.parametrize(("name", "offset", "shape", "value", "message"), MALFORMED, ids=[m[0] for m in MALFORMED])
def test_malformed_bzimage_is_refused(save, build, name, offset, shape, value, message):
    with pytest.raises(ImageError, match=message):
        open_kernel(save(patched(build.bzimage(), offset, shape, value)))


def test_bzimage_cut_anywhere_is_refused(save, build):
    whole = build.bzimage()
    for size in (*range(0x1FF, 0x270), 1023, 1024, 0x800, len(whole) - 1):
        with pytest.raises(ImageError):
            open_kernel(save(whole[:size]))
