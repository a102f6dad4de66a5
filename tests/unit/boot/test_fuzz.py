"""Kernels with random damage: they load, or are refused with a reason. Nothing else may escape."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlite.boot import load_kernel, open_kernel
from kvmlite.errors import ConfigError, ImageError, UnsupportedError
from kvmlite.memory.guest_memory import GuestMemory

EDGES = st.sampled_from([0, 1, 2, 4, 7, 8, 127, 128, 255])
damage = st.lists(st.tuples(st.integers(0, 0x400), st.one_of(EDGES, st.integers(0, 255))), max_size=12)
wide = st.lists(
    st.tuples(st.integers(0, 0x270), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])),
    max_size=2,
)
options = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(data: bytes, flips: list[tuple[int, int]], words: list[tuple[int, int]], cut: int) -> bytes:
    copy = bytearray(data)
    for at, value in words:
        size = 8 if value >= 2**32 else 4
        if at + size <= len(copy):
            copy[at : at + size] = value.to_bytes(size, "little")
    for at, value in flips:
        if at < len(copy):
            copy[at] = value
    return bytes(copy[: len(copy) - cut])


def attempt(data: bytes, *, unpack: bool = True) -> None:
    fd = os.memfd_create("kernel")
    memory = GuestMemory(20 << 20)
    try:
        os.write(fd, data)
        with open_kernel(f"/proc/self/fd/{fd}") as image:
            load_kernel(memory, image, cmdline="x", initrd=b"initrd", acpi_rsdp=0xE0000, unpack=unpack)
    except (ImageError, ConfigError, UnsupportedError) as refused:
        if not str(refused) or "\n" in str(refused):
            raise AssertionError(f"not one line: {refused!r}") from refused
    finally:
        memory.close()
        os.close(fd)


@options
@given(damage, wide, st.integers(0, 8))
def test_pvh_elf(build, flips, words, cut):
    attempt(damaged(build.pvh(), flips, words, cut))


@options
@given(damage, wide, st.integers(0, 8))
def test_vmlinux(build, flips, words, cut):
    attempt(damaged(build.vmlinux(), flips, words, cut))


@options
@given(damage, wide, st.integers(0, 8), st.booleans())
def test_bzimage(build, flips, words, cut, unpack):
    attempt(damaged(build.bzimage(), flips, words, cut), unpack=unpack)


@options
@given(st.lists(st.tuples(st.integers(0x400, 0x900), st.integers(0, 255)), max_size=6))
def test_bzimage_payload(build, flips):
    attempt(damaged(build.bzimage(), flips, [], 0))


@options
@given(damage, wide, st.integers(0, 8))
def test_multiboot(build, flips, words, cut):
    header = bytes.fromhex("02b0ad1b 00000100 fe4f51e4 00001000 00001000 00000000 00000000 20001000")
    attempt(damaged(header + b"\xf4" * 64, flips, words, cut))


@options
@given(st.binary(max_size=300))
def test_noise(noise):
    attempt(noise)
