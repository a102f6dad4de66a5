"""Kernels of a few hundred bytes, made to order, and guest memory to load them into."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvmlite.memory.guest_memory import GuestMemory

MakeMemory = Callable[..., GuestMemory]
Load = tuple[int, int, bytes, int]  # physical address, virtual address, bytes, memory size


def note(owner: bytes, kind: int, description: bytes) -> bytes:
    """One ELF note with 4-byte padding."""
    name = owner + b"\0"
    head = struct.pack("<III", len(name), len(description), kind)
    return head + name.ljust(-(-len(name) // 4) * 4, b"\0") + description.ljust(-(-len(description) // 4) * 4, b"\0")


def build_elf(
    loads: Sequence[Load],
    *,
    entry: int,
    notes: bytes = b"",
    bits: int = 64,
    machine: int | None = None,
    kind: int = 2,
) -> bytes:
    """An ELF executable with these PT_LOAD segments, in file order behind the headers."""
    count = len(loads) + bool(notes)
    header_size, entry_size = (64, 56) if bits == 64 else (52, 32)
    at = header_size + count * entry_size
    table, body = b"", b""

    def header(kind: int, offset: int, vaddr: int, paddr: int, file_size: int, memory_size: int, align: int) -> bytes:
        if bits == 64:
            return struct.pack("<IIQQQQQQ", kind, 7, offset, vaddr, paddr, file_size, memory_size, align)
        return struct.pack("<IIIIIIII", kind, offset, vaddr, paddr, file_size, memory_size, 7, align)

    for paddr, vaddr, data, memory_size in loads:
        table += header(1, at + len(body), vaddr, paddr, len(data), memory_size, 4096)
        body += data
    if notes:
        body = body.ljust(-(-len(body) // 4) * 4, b"\0")
        table += header(4, at + len(body), 0, 0, len(notes), len(notes), 4)
        body += notes
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    machine = machine if machine is not None else (62 if bits == 64 else 3)
    shape = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    rest = struct.pack(shape, kind, machine, 1, entry, header_size, 0, 0, header_size, entry_size, count, 0, 0, 0)
    return ident + rest + table + body


def build_pvh(*, entry: int = 0x100000, code: bytes = b"\xf4" * 16, paddr: int = 0x100000, bits: int = 64) -> bytes:
    """A PVH kernel of one segment."""
    return build_elf(
        [(paddr, paddr, code, len(code) + 32)],
        entry=entry,
        notes=note(b"Xen", 18, entry.to_bytes(4, "little")),
        bits=bits,
    )


def build_vmlinux(code: bytes = b"\x90" * 64, *, paddr: int = 0x1000000) -> bytes:
    """A Linux kernel as far as its headers go."""
    return build_elf(
        [(paddr, 0xFFFFFFFF80000000 + paddr, code, 0x2000)],
        entry=paddr,
        notes=note(b"Xen", 6, b"linux\0") + note(b"Linux", 257, b"6.1.0-test\0"),
    )


def gzip_payload(data: bytes) -> bytes:
    """As the kernel build makes it: the size is the end of the gzip stream."""
    stream = zlib.compressobj(wbits=31)
    return stream.compress(data) + stream.flush()


def build_bzimage(
    payload: bytes | None = None,
    *,
    setup_sects: int = 1,
    version: int = 0x020F,
    xloadflags: int = 0x7F,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFFFFFF,
    init_size: int = 0x100000,
) -> bytes:
    """A bzImage: setup, 0x400 bytes of code, the payload (a gzipped vmlinux unless given)."""
    if payload is None:
        payload = gzip_payload(build_vmlinux())
    code = (b"\xcc" * 0x400 + payload).ljust(-(-(0x400 + len(payload)) // 16) * 16, b"\0")
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    for offset, shape, value in (
        (0x1F1, "<B", setup_sects),
        (0x1F2, "<H", 1),
        (0x1F4, "<I", len(code) // 16),
        (0x1FE, "<H", 0xAA55),
        (0x200, "<H", 0x6AEB),
        (0x202, "<4s", b"HdrS"),
        (0x206, "<H", version),
        (0x211, "<B", 1),
        (0x214, "<I", 0x100000),
        (0x22C, "<I", initrd_addr_max),
        (0x230, "<I", 0x200000),
        (0x234, "<B", 1),
        (0x236, "<H", xloadflags),
        (0x238, "<I", cmdline_size),
        (0x248, "<I", 0x400),
        (0x24C, "<I", len(payload)),
        (0x258, "<Q", 0x1000000),
        (0x260, "<I", init_size),
    ):
        struct.pack_into(shape, setup, offset, value)
    return bytes(setup) + code


@pytest.fixture
def make_memory() -> Iterator[MakeMemory]:
    """``make_memory(mebibytes)``: guest RAM, closed at the end."""
    made: list[GuestMemory] = []

    def make(mebibytes: int = 32, *, layout: list[tuple[int, int]] | None = None) -> GuestMemory:
        size = mebibytes << 20 if layout is None else sum(size for _, size in layout)
        made.append(GuestMemory(size, layout=layout))
        return made[-1]

    yield make
    for memory in made:
        memory.close()


@pytest.fixture
def memory(make_memory: MakeMemory) -> GuestMemory:
    """32 MiB of guest RAM."""
    return make_memory(32)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[bytes], str]:
    """``save(data)``: a file with that content; its path."""
    count = 0

    def write(data: bytes) -> str:
        nonlocal count
        count += 1
        path = tmp_path / f"kernel{count}"
        path.write_bytes(data)
        return str(path)

    return write


class Build:
    """The builders above, for tests to ask for by name."""

    elf = staticmethod(build_elf)
    pvh = staticmethod(build_pvh)
    vmlinux = staticmethod(build_vmlinux)
    bzimage = staticmethod(build_bzimage)
    gzip_payload = staticmethod(gzip_payload)
    note = staticmethod(note)


@pytest.fixture
def build() -> type[Build]:
    """Builders of small kernels."""
    return Build
