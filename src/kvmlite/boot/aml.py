"""AML, the byte code of the DSDT: one small function per construct, bytes in, bytes out (ACPI 6.5, 20.2 and 6.4)."""

from __future__ import annotations

from kvmlite.abi import acpi as abi


def name_string(path: str) -> bytes:
    """A name: ``_SB_``, ``\\_SB_`` or ``_SB_.COM1``; each part has four characters."""
    prefix = b""
    if path.startswith("\\"):
        prefix, path = bytes([abi.ROOT_CHAR]), path[1:]
    parts = path.split(".")
    for part in parts:
        if len(part) != 4 or not all(c.isascii() and (c.isupper() or c == "_" or c.isdigit()) for c in part):
            raise ValueError(f"{part!r} is no AML name: four of A-Z, 0-9 and _")
        if part[0].isdigit():
            raise ValueError(f"{part!r} is no AML name: starts with a digit")
    if len(parts) > 2:
        raise ValueError(f"{path!r} has more than two parts")
    joined = "".join(parts).encode("ascii")
    return prefix + (bytes([abi.DUAL_NAME_PREFIX]) if len(parts) == 2 else b"") + joined


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits."""
    if value in (0, 1):
        return bytes([abi.ONE_OP if value else abi.ZERO_OP])
    for prefix, size in (
        (abi.BYTE_PREFIX, 1),
        (abi.WORD_PREFIX, 2),
        (abi.DWORD_PREFIX, 4),
        (abi.QWORD_PREFIX, 8),
    ):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(value: str) -> bytes:
    """A NUL-terminated ASCII string."""
    return bytes([abi.STRING_PREFIX]) + value.encode("ascii") + b"\0"


def eisa_id(value: str) -> bytes:
    """A compressed EISA id such as ``PNP0501``: three letters of 5 bits and four hexadecimal digits, big-endian."""
    letters = [ord(letter) - 0x40 for letter in value[:3]]
    if len(value) != 7 or not all(1 <= letter <= 26 for letter in letters):
        raise ValueError(f"{value!r} is no EISA id")
    number = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(value[3:], 16)
    return bytes([abi.DWORD_PREFIX]) + number.to_bytes(4, "big")


def package_length(size: int) -> bytes:
    """PkgLength (20.2.4) of a body of ``size`` bytes; it counts its own 1 to 4 bytes too."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML body of {size} bytes does not fit in a PkgLength")


def name(path: str, value: bytes) -> bytes:
    """``Name (path, value)``."""
    return bytes([abi.NAME_OP]) + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """``Package () { elements }``."""
    body = bytes([len(elements)]) + b"".join(elements)
    return bytes([abi.PACKAGE_OP]) + package_length(len(body)) + body


def buffer(data: bytes) -> bytes:
    """``Buffer () { data }``."""
    body = integer(len(data)) + data
    return bytes([abi.BUFFER_OP]) + package_length(len(body)) + body


def scope(path: str, *objects: bytes) -> bytes:
    """``Scope (path) { objects }``."""
    body = name_string(path) + b"".join(objects)
    return bytes([abi.SCOPE_OP]) + package_length(len(body)) + body


def device(path: str, *objects: bytes) -> bytes:
    """``Device (path) { objects }``."""
    body = name_string(path) + b"".join(objects)
    return bytes([abi.EXT_OP_PREFIX, abi.DEVICE_OP]) + package_length(len(body)) + body


def resource_template(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () { descriptors }``: a buffer with the end tag (checksum 0: not checked)."""
    return buffer(b"".join(descriptors) + abi.END_TAG)


def io_ports(first: int, count: int) -> bytes:
    """``IO (Decode16, first, first, 1, count)``."""
    return abi.IO_PORT.pack(0x47, 1, first, first, 1, count)


def memory32_fixed(gpa: int, size: int) -> bytes:
    """``Memory32Fixed (ReadWrite, gpa, size)``."""
    return abi.MEMORY32_FIXED.pack(0x86, 9, 1, gpa, size)


def interrupt(gsi: int) -> bytes:
    """``Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { gsi }``."""
    return abi.EXTENDED_INTERRUPT.pack(0x89, 6, abi.INTERRUPT_CONSUMER | abi.INTERRUPT_EDGE, 1, gsi)
