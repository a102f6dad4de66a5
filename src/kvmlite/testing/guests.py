"""Guests of a few bytes: machine code in, a bootable file out. For tests, examples and benchmarks."""

from __future__ import annotations

import struct

LOAD_ADDRESS = 0x100000
_HEADER_SIZE = 52
_PROGRAM_HEADER_SIZE = 32
_PVH_NOTE_TYPE = 18  # XEN_ELFNOTE_PHYS32_ENTRY


def pvh_elf(code: bytes) -> bytes:
    """An ELF32 kernel with a PVH note: starts at ``code`` in 32-bit protected mode, flat segments, RBX = start info.

    Shape: ELF header (52), two program headers (64), note (20), code; loaded as one segment at 1 MiB with 1 MiB of
    zeroed room behind it.
    """
    note_offset = _HEADER_SIZE + 2 * _PROGRAM_HEADER_SIZE
    note = struct.pack("<III4sI", 4, 4, _PVH_NOTE_TYPE, b"Xen\0", LOAD_ADDRESS + note_offset + 20)
    entry = LOAD_ADDRESS + note_offset + len(note)
    size = note_offset + len(note) + len(code)
    identity = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = identity + struct.pack(
        "<HHIIIIIHHHHHH", 2, 3, 1, entry, _HEADER_SIZE, 0, 0, _HEADER_SIZE, _PROGRAM_HEADER_SIZE, 2, 0, 0, 0
    )
    load = struct.pack("<8I", 1, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size + (1 << 20), 7, 0x1000)
    note_header = struct.pack(
        "<8I", 4, note_offset, LOAD_ADDRESS + note_offset, LOAD_ADDRESS + note_offset, len(note), len(note), 4, 4
    )
    return header + load + note_header + note + code


# mov al, <value>; out 0xf4, al; hlt
def debug_exit_code(value: int) -> bytes:
    """Machine code that writes ``value`` to the debug-exit port and halts: status ``2 * value + 1``."""
    return bytes([0xB0, value & 0xFF, 0xE6, 0xF4, 0xF4])


def init_elf(line: str) -> bytes:
    """A static x86-64 Linux program that prints ``line`` and then sleeps for ever: an ``/init`` for boot measurements.

    Shape: ELF64 header (64), one program header (56), code, text; loaded as one segment at 4 MiB.
    """
    text = f"{line}\n".encode()
    # mov eax, 1 (write); mov edi, eax; lea rsi, [rip + 17]; mov edx, size; syscall; 1: mov eax, 34 (pause); syscall; jmp 1b
    code = (
        b"\xb8\x01\x00\x00\x00\x89\xc7\x48\x8d\x35\x10\x00\x00\x00\xba" + struct.pack("<I", len(text))
        + b"\x0f\x05\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7"
    )  # fmt: skip
    base, header_size = 0x400000, 64 + 56
    size = header_size + len(code) + len(text)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + header_size, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + code + text
