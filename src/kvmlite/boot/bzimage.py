"""bzImage: the setup header, judged, and where the parts of the file are (Linux boot protocol)."""

from __future__ import annotations

from kvmlite.abi import linux_boot as abi
from kvmlite.errors import ImageError
from kvmlite.records import dataclass

_SECTOR = 512
_MIN_HEADER_END = abi.INIT_SIZE + 4
_DAMAGED = "the file is damaged; copy or download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class BzImage:
    """A checked bzImage. Offsets and sizes in bytes of the file.

    Attributes:
        header: The setup header from file offset 0x1f1 to its end, as the file has it.
        version: Boot protocol, 0x020f is 2.15.
        code_offset, code_size: The protected-mode code.
        payload_offset, payload_size: The compressed kernel, with the 4-byte size after it; size 0 if not said.
        cmdline_size: Longest command line the kernel takes, without the NUL.
        initrd_addr_max: Highest address the last byte of the initrd may have.
        pref_address, init_size: Where the kernel runs (GPA) and the RAM it needs there.
        is_relocatable: Whether the protected-mode code may be loaded elsewhere than 0x100000.
    """

    header: bytes
    version: int
    code_offset: int
    code_size: int
    payload_offset: int
    payload_size: int
    cmdline_size: int
    initrd_addr_max: int
    pref_address: int
    init_size: int
    is_relocatable: bool


def parse_bzimage(head: bytes, size: int, path: str) -> BzImage:
    """Check the setup header of a bzImage.

    Args:
        head: First 4096 bytes of the file.
        size: Bytes of the file.
        path: Its name, for messages.

    Raises:
        ImageError: truncated, damaged, or a kernel without the 64-bit entry.
    """
    if len(head) < _MIN_HEADER_END:
        raise ImageError(
            f"{path}: truncated bzImage: {size} bytes, the setup header ends after {_MIN_HEADER_END}",
            hint=_DAMAGED,
        )
    version = _le16(head, abi.VERSION)
    if _le16(head, abi.BOOT_FLAG) != abi.BOOT_FLAG_MAGIC:
        raise ImageError(f"{path}: bzImage without the boot flag 0xaa55 at 0x1fe", hint=_DAMAGED)
    if version < abi.PROTOCOL_2_12 or not _le16(head, abi.XLOADFLAGS) & abi.XLF_KERNEL_64:
        raise ImageError(
            f"{path}: is a 32-bit Linux kernel (boot protocol {version >> 8}.{version & 0xFF:02}, no 64-bit entry)",
            hint="kvmlite boots 64-bit kernels, 3.8 and later",
        )
    header_end = abi.HEADER + head[abi.SETUP_HEADER_END]
    if not _MIN_HEADER_END <= header_end <= abi.SETUP_HEADER + 0x290 - 0x1F1:
        raise ImageError(
            f"{path}: setup header ends at {header_end:#x}, allowed {_MIN_HEADER_END:#x}-0x290",
            hint=_DAMAGED,
        )
    code_offset = ((head[abi.SETUP_SECTS] or 4) + 1) * _SECTOR
    code_size = _le32(head, abi.SYSSIZE) * 16
    if code_size <= abi.ENTRY_64:
        raise ImageError(f"{path}: bzImage with {code_size} bytes of protected-mode code", hint=_DAMAGED)
    if code_offset + code_size > size:
        raise ImageError(
            f"{path}: truncated bzImage: its code ends at byte {code_offset + code_size}, the file has {size}",
            hint=_DAMAGED,
        )
    image = BzImage(
        header=head[abi.SETUP_HEADER : header_end],
        version=version,
        code_offset=code_offset,
        code_size=code_size,
        payload_offset=code_offset + _le32(head, abi.PAYLOAD_OFFSET),
        payload_size=_le32(head, abi.PAYLOAD_LENGTH),
        cmdline_size=_le32(head, abi.CMDLINE_SIZE),
        initrd_addr_max=_le32(head, abi.INITRD_ADDR_MAX),
        pref_address=int.from_bytes(head[abi.PREF_ADDRESS : abi.PREF_ADDRESS + 8], "little"),
        init_size=_le32(head, abi.INIT_SIZE),
        is_relocatable=bool(head[abi.RELOCATABLE_KERNEL]),
    )
    _check_values(image, path, size)
    return image


def _check_values(image: BzImage, path: str, size: int) -> None:
    if image.payload_size and image.payload_offset + image.payload_size > size:
        raise ImageError(
            f"{path}: truncated bzImage: its payload ends at byte "
            f"{image.payload_offset + image.payload_size}, the file has {size}",
            hint=_DAMAGED,
        )
    if 0 < image.payload_size <= 8:
        raise ImageError(f"{path}: bzImage with a payload of {image.payload_size} bytes", hint=_DAMAGED)
    if not 0x100000 <= image.pref_address < 1 << 32 or image.pref_address % 4096:
        raise ImageError(
            f"{path}: bzImage wants to run at {image.pref_address:#x}, allowed are pages of 1 MiB to 4 GiB",
            hint=_DAMAGED,
        )
    if image.init_size < image.code_size:
        raise ImageError(
            f"{path}: bzImage says it needs {image.init_size} bytes of RAM, less than its own {image.code_size}",
            hint=_DAMAGED,
        )


def _le16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _le32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")
