"""Whether a disk image names other files of the host. Images may come from anybody, and their server would open those files.

Only what can refer elsewhere is looked at; whether the image is sound is its server's business.
"""

from __future__ import annotations

import os
import re
from struct import Struct

from kvmlite.errors import ImageError

_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_HEADER = Struct(">4sIQI")
"""0 magic / 4 be32 version / 8 be64 offset of the backing file's name / 16 be32 its size."""
_QCOW2_FEATURES = Struct(">Q")
_QCOW2_FEATURES_AT = 72  # be64, from version 3 on
_QCOW2_EXTERNAL_DATA = 1 << 2

_VMDK_SPARSE_MAGIC = b"KDMV"
_VMDK_OLD_MAGIC = b"COWD"
_VMDK_DESCRIPTOR = Struct("<QQ")
_VMDK_DESCRIPTOR_AT = 28  # le64 first sector of the text, le64 sectors
_VMDK_TEXT_MAGIC = b"# Disk DescriptorFile"
_VMDK_TEXT_LIMIT = 20 << 20  # as qemu-storage-daemon's
_VMDK_EXTENT = re.compile(rb'^\s*(?:RW|RDONLY|NOACCESS)\s+-?\d+\s+\w+\s+"([^"\n]*)"', re.MULTILINE | re.IGNORECASE)
_VMDK_PARENT = re.compile(rb"^\s*(?:parentFileNameHint\s*=|parentCID\s*=\s*(?!f{8}\s*$))", re.MULTILINE | re.IGNORECASE)
_SECTOR = 512


def check_references(fd: int, path: str, format: str) -> None:
    """Check that an image of this format is all in one place.

    Raises:
        ImageError: It names other files, or is not of the format.
        OSError: Reading failed.
    """
    if format == "qcow2":
        _check_qcow2(fd, path)
    elif format == "vmdk":
        _check_vmdk(fd, path)


def _check_qcow2(fd: int, path: str) -> None:
    header = os.pread(fd, _QCOW2_HEADER.size, 0)
    if len(header) < _QCOW2_HEADER.size or not header.startswith(_QCOW2_MAGIC):
        raise ImageError(f"{path} is not a qcow2 image", hint="say what it is with format=")
    _, version, backing, _ = _QCOW2_HEADER.unpack(header)
    features = os.pread(fd, _QCOW2_FEATURES.size, _QCOW2_FEATURES_AT).ljust(_QCOW2_FEATURES.size, b"\0")
    if backing:
        raise ImageError(
            f"{path} has a backing file", hint=f"make one image of the two: qemu-img convert -O qcow2 {path} NEW.qcow2"
        )
    if version >= 3 and _QCOW2_FEATURES.unpack(features)[0] & _QCOW2_EXTERNAL_DATA:
        raise ImageError(
            f"{path} keeps its data in another file",
            hint=f"make one image of the two: qemu-img convert -O qcow2 {path} NEW.qcow2",
        )


def _check_vmdk(fd: int, path: str) -> None:
    start = os.pread(fd, 64, 0)
    if start.startswith(_VMDK_OLD_MAGIC):
        raise ImageError(f"{path} is a VMDK image of an old kind (COWD)", hint="convert it with qemu-img convert")
    if start.startswith(_VMDK_SPARSE_MAGIC) and len(start) == 64:
        first, count = _VMDK_DESCRIPTOR.unpack_from(start, _VMDK_DESCRIPTOR_AT)
        if not first:
            return
        text = os.pread(fd, min(count * _SECTOR, _VMDK_TEXT_LIMIT), min(first * _SECTOR, 1 << 62))
    elif start.startswith(_VMDK_TEXT_MAGIC):
        text = os.pread(fd, _VMDK_TEXT_LIMIT, 0)
    else:
        raise ImageError(f"{path} is not a VMDK image", hint="say what it is with format=")
    for name in _VMDK_EXTENT.findall(text):
        if b"/" in name or b"\\" in name:
            raise ImageError(f"{path} keeps its data elsewhere, in {os.fsdecode(name)!r}")
    if _VMDK_PARENT.search(text):
        raise ImageError(
            f"{path} is the difference to another image", hint="make one image of the two: qemu-img convert"
        )
