"""Say what a file is that was given as a kernel and is none. Off the start path: imported when a file is refused."""

from __future__ import annotations

import stat

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)

_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    (b"\x02\x21\x4c\x18", "lz4 (legacy)", "unlz4"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\x5d\0\0", "lzma", "unlzma"),
    (b"\x89LZO", "lzo", "lzop -d"),
)

_OTHERS = (
    (0, b"070701", "is a cpio archive (an initramfs?)", "give it with --initrd"),
    (0, b"070702", "is a cpio archive (an initramfs?)", "give it with --initrd"),
    (0, b"QFI\xfb", "is a qcow2 disk image", "give it as a disk"),
    (0, b"KDMV", "is a VMDK disk image", "give it as a disk"),
    (0, b"hsqs", "is a squashfs image", "give it as a disk"),
    (1080, b"\x53\xef", "is an ext2/3/4 file system image", "give it as a disk"),
    (257, b"ustar", "is a tar archive", "unpack it and give the kernel in it"),
    (
        0,
        b"!<arch>\n",
        "is an ar archive (a Debian package?)",
        "unpack it and give the kernel in boot/",
    ),
    (0, b"\xed\xab\xee\xdb", "is an RPM package", "unpack it and give the kernel in it"),
    (0, b"PK\x03\x04", "is a ZIP archive", "unpack it and give the kernel in it"),
    (56, b"ARM\x64", "is an AArch64 kernel Image", "kvmlite runs x86-64 kernels"),
    (56, b"RSC\x05", "is a RISC-V kernel Image", "kvmlite runs x86-64 kernels"),
    (0, b"\x27\x05\x19\x56", "is a U-Boot image", "kvmlite runs x86-64 bzImage and ELF kernels"),
    (
        0,
        b"\xd0\x0d\xfe\xed",
        "is a flattened device tree (FIT image?)",
        "kvmlite runs x86-64 bzImage and ELF kernels",
    ),
)

_WANTED = "a kernel is a bzImage (vmlinuz), an x86-64 ELF (vmlinux) or a multiboot image"


def file_kind(mode: int) -> str:
    """Name of what ``st_mode`` says the file is."""
    for test, name in _KINDS:
        if test(mode):
            return name
    return "a special file"


def describe(head: bytes, size: int) -> tuple[str, str]:
    """What the file is instead of a kernel, as the rest of a sentence, and a hint.

    Args:
        head: First bytes of the file, 4096 where it has them.
        size: Bytes of the file.
    """
    if not size:
        return "is an empty file", _WANTED
    for magic, name, command in _COMPRESSED:
        if head.startswith(magic):
            return (
                f"is a {name}-compressed file, not a kernel",
                f"if it holds a kernel, unpack it first: {command}",
            )
    for offset, magic, what, hint in _OTHERS:
        if head.startswith(magic, offset):
            return f"{what}, not a kernel for x86-64", hint
    if size < 0x206 and (head.startswith(b"MZ") or head[510:512] == b"\x55\xaa"):
        return (
            f"truncated bzImage: {size} bytes, the setup header ends after 518",
            "copy or download it again",
        )
    if head.startswith(b"MZ"):
        return "is a Windows or EFI program without a Linux setup header", _WANTED
    if head[510:512] == b"\x55\xaa":
        return "is a boot sector or disk image, not a kernel", "give it as a disk"
    if not head.strip(b"\0"):
        return "starts with zeros only: not a kernel", _WANTED
    if head.startswith(b"#!"):
        return "is a script, not a kernel", _WANTED
    if _is_text(head):
        return "is a text file, not a kernel", _WANTED
    return f"is not a kernel (starts with {head[:8].hex(' ')})", _WANTED


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just cut inside a character
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\n\r\f\x1b" for character in text)
