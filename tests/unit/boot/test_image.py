from __future__ import annotations

import gzip
import os
import socket
import struct
from pathlib import Path

import pytest

from kvmlite.boot import open_kernel
from kvmlite.errors import ImageError


def test_open_kernel_recognises_a_pvh_elf(save, build):
    with open_kernel(save(build.pvh())) as image:
        assert image.elf.pvh_entry == 0x100000
        assert image.protocols == ("pvh",)


def test_open_kernel_recognises_a_32_bit_pvh_elf(save, build):
    with open_kernel(save(build.pvh(bits=32))) as image:
        assert (image.elf.bits, image.elf.pvh_entry) == (32, 0x100000)


def test_open_kernel_recognises_a_vmlinux_by_its_guest_os_note(save, build):
    with open_kernel(save(build.vmlinux())) as image:
        assert image.preferred_protocol == "linux"


def test_open_kernel_recognises_a_vmlinux_without_notes_by_where_it_is_linked(save, build):
    data = build.elf([(0x1000000, 0xFFFFFFFF81000000, b"\x90" * 16, 16)], entry=0x1000000)
    with open_kernel(save(data)) as image:
        assert image.protocols == ("linux",)


def test_open_kernel_takes_another_guest_os_for_pvh_even_where_it_is_linked_like_linux(save, build):
    notes = build.note(b"Xen", 6, b"FreeBSD\0") + build.note(b"Xen", 18, struct.pack("<Q", 0x200000))
    data = build.elf([(0x200000, 0xFFFFFFFF80200000, b"\x90" * 16, 16)], entry=0x200000, notes=notes)
    with open_kernel(save(data)) as image:
        assert image.protocols == ("pvh",)


def test_open_kernel_prefers_linux_and_offers_pvh(save, build):
    notes = build.note(b"Linux", 256, b"\0\0\0\0") + build.note(b"Xen", 18, struct.pack("<Q", 0x1000000))
    data = build.elf([(0x1000000, 0xFFFFFFFF81000000, b"\x90" * 16, 16)], entry=0x1000000, notes=notes)
    with open_kernel(save(data)) as image:
        assert image.protocols == ("linux", "pvh")


def test_open_kernel_recognises_a_bzimage_whatever_its_name(save, build):
    with open_kernel(save(build.bzimage())) as image:
        assert image.protocols == ("linux",)
        assert image.bzimage.version == 0x020F


def test_close_closes_the_file_once(save, build):
    image = open_kernel(save(build.pvh()))
    fd = image.fd
    image.close()
    image.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_open_kernel_leaves_no_descriptor_behind_when_it_refuses(save):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError):
        open_kernel(save(b"text\n"))
    assert len(os.listdir("/proc/self/fd")) == before


def arm64_image() -> bytes:
    return bytes(56) + b"ARM\x64" + bytes(200)


REFUSED = [
    (b"", "is an empty file"),
    (b"hello, this is a note\n", "is a text file, not a kernel"),
    ("größer\n".encode() * 2000, "is a text file, not a kernel"),
    (b"#!/bin/sh\n", "is a script, not a kernel"),
    (bytes(5000), "starts with zeros only"),
    (b"\x00\x01\x02\x03\xff\xfe", "is not a kernel (starts with 00 01 02 03 ff fe)"),
    (gzip.compress(b"x" * 100), "is a gzip-compressed file"),
    (b"\xfd7zXZ\0" + bytes(40), "is a xz-compressed file"),
    (b"\x28\xb5\x2f\xfd" + bytes(40), "is a zstd-compressed file"),
    (b"070701" + b"0" * 104, "is a cpio archive"),
    (b"QFI\xfb" + bytes(100), "is a qcow2 disk image"),
    (bytes(1080) + b"\x53\xef" + bytes(100), "is an ext2/3/4 file system image"),
    (b"!<arch>\ndebian-binary", "is an ar archive"),
    (arm64_image(), "is an AArch64 kernel Image"),
    (b"MZ" + b"\x90" * 300, "truncated bzImage: 302 bytes"),
    (b"MZ" + b"\x90" * 3000, "is a Windows or EFI program"),
    (bytes(510) + b"\x55\xaa", "truncated bzImage: 512 bytes"),
    (bytes(510) + b"\x55\xaa" + bytes(1000), "is a boot sector or disk image"),
    (b"\x7fELF", "truncated ELF: 4 bytes"),
    (b"\x7fELF\x02\x01\x01" + bytes(20), "truncated ELF: 27 bytes, its header has 64"),
    (struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 2, 183) + bytes(44), "is an ELF for AArch64"),
    (struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 2, 243) + bytes(44), "is an ELF for RISC-V"),
    (
        struct.pack("<16sHH", b"\x7fELF\x01\x01\x01", 2, 40) + bytes(44),
        "is an ELF for ARM (32-bit)",
    ),
    (
        struct.pack("<16sHH", b"\x7fELF\x01\x01\x01", 2, 62) + bytes(44),
        "x86-64 with 32-bit pointers",
    ),
    (
        struct.pack(">16sHH", b"\x7fELF\x02\x02\x01", 2, 22) + bytes(44),
        "is a big-endian ELF for S/390",
    ),
    (
        struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 1, 62) + bytes(44),
        "is an object file or kernel module",
    ),
    (struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 4, 62) + bytes(44), "is a core dump"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_open_kernel_says_what_a_refused_file_is(save, content, message):
    path = save(content)
    with pytest.raises(ImageError) as refused:
        open_kernel(path)
    text = str(refused.value)
    assert text.startswith(path)
    assert message in text
    assert "\n" not in text + refused.value.hint


def test_open_kernel_refuses_a_user_program(save, build):
    data = bytearray(build.elf([(0x400000, 0x400000, b"\x90" * 16, 16)] * 1, entry=0x400000))
    with pytest.raises(ImageError, match="is an ELF that is no Linux kernel"):
        open_kernel(save(bytes(data)))


def test_open_kernel_refuses_a_dynamically_linked_program(save, build):
    data = bytearray(build.elf([(0x400000, 0x400000, b"\x90" * 16, 16), (0, 0, b"/lib/ld.so", 10)], entry=0x400000))
    struct.pack_into("<I", data, 64 + 56, 3)
    with pytest.raises(ImageError, match="is a dynamically linked program"):
        open_kernel(save(bytes(data)))


def test_open_kernel_refuses_a_directory(tmp_path: Path):
    with pytest.raises(ImageError, match="is a directory"):
        open_kernel(tmp_path)


def test_open_kernel_refuses_a_fifo_without_waiting_for_a_writer(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="is a FIFO"):
        open_kernel(tmp_path / "fifo")


def test_open_kernel_refuses_a_socket(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(ImageError, match="cannot read the kernel: No such device"):
            open_kernel(tmp_path / "s")


def test_open_kernel_refuses_a_device():
    with pytest.raises(ImageError, match="/dev/null: is a character device"):
        open_kernel("/dev/null")


def test_open_kernel_names_the_reason_for_a_missing_file(tmp_path: Path):
    with pytest.raises(ImageError, match="cannot read the kernel: No such file or directory"):
        open_kernel(tmp_path / "none")


def test_open_kernel_refuses_a_name_with_a_nul():
    with pytest.raises(ImageError, match="null byte"):
        open_kernel("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_open_kernel_names_the_reason_for_an_unreadable_file(save):
    path = save(b"x")
    os.chmod(path, 0)
    with pytest.raises(ImageError, match="Permission denied"):
        open_kernel(path)
