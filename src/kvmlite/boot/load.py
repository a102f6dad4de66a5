"""Load a kernel: choose the protocol, import only its loader."""

from __future__ import annotations

from kvmlite.errors import ConfigError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Literal

    from kvmlite.boot.entry import EntryState, Ram
    from kvmlite.boot.image import KernelImage
    from kvmlite.boot.initrd import Initrd, InitrdPart

    ProtocolChoice = Literal["auto", "linux", "pvh", "multiboot"]

_PROTOCOLS = ("auto", "linux", "pvh", "multiboot")


def load_kernel(
    memory: Ram,
    image: KernelImage,
    *,
    cmdline: str | bytes = "",
    initrd: InitrdPart | Sequence[InitrdPart] | None = None,
    acpi_rsdp: int = 0,
    protocol: ProtocolChoice = "auto",
    unpack: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> EntryState:
    """Put a kernel and all it is started with into guest memory.

    Args:
        memory: Fresh guest RAM, all zeros: no loader clears any; ACPI tables are installed separately (``boot.acpi.install``).
        image: From ``open_kernel``; stays open.
        cmdline: Kernel command line.
        initrd: Path or contents of the initrd, or several to be put behind each other.
        acpi_rsdp: GPA of the RSDP; 0 without ACPI.
        protocol: "auto": Linux for Linux kernels, else PVH, else multiboot.
        unpack: Unpack a bzImage on the host. False: the guest does, which takes longer and allows KASLR.
        cache_dir: Where unpacked kernels are kept; None keeps nothing.

    Returns:
        The state the first vCPU must have.

    Raises:
        ImageError: the kernel or initrd is damaged or cannot be started this way.
        ConfigError: something does not fit in the guest's RAM, or the command line is wrong.
        UnsupportedError: the decompressor for this kernel is not installed.
    """
    if protocol not in _PROTOCOLS:
        raise ConfigError(f"unknown boot protocol {protocol!r}", hint=f"one of {', '.join(_PROTOCOLS)}")
    chosen = image.preferred_protocol if protocol == "auto" else protocol
    encoded = b""
    if cmdline:
        from kvmlite.boot.cmdline import encode_cmdline

        encoded = encode_cmdline(cmdline)
    if initrd is None:
        return _load(memory, image, chosen, encoded, None, acpi_rsdp, unpack, cache_dir)
    from kvmlite.boot.initrd import open_initrd

    with open_initrd(initrd) as opened:
        return _load(memory, image, chosen, encoded, opened, acpi_rsdp, unpack, cache_dir)


def _load(
    memory: Ram,
    image: KernelImage,
    protocol: str,
    cmdline: bytes,
    initrd: Initrd | None,
    acpi_rsdp: int,
    unpack: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> EntryState:
    if protocol == "linux":
        return _load_linux(memory, image, cmdline, initrd, acpi_rsdp, unpack, cache_dir)
    if protocol == "pvh" and image.elf is not None:
        from kvmlite.boot.pvh import load_pvh

        return load_pvh(
            memory,
            image.fd,
            image.elf,
            image.path,
            cmdline=cmdline,
            initrd=initrd,
            acpi_rsdp=acpi_rsdp,
        )
    if protocol == "multiboot" and image.multiboot is not None:
        from kvmlite.boot.multiboot import load_multiboot

        return load_multiboot(memory, image, image.multiboot, cmdline=cmdline, initrd=initrd)
    raise _cannot(image, protocol)


def _load_linux(
    memory: Ram,
    image: KernelImage,
    cmdline: bytes,
    initrd: Initrd | None,
    acpi_rsdp: int,
    unpack: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> EntryState:
    from kvmlite.boot import linux

    given = linux.LinuxInput(cmdline=cmdline, initrd=initrd, acpi_rsdp=acpi_rsdp)
    if image.elf is not None:
        return linux.load_vmlinux(memory, image.fd, image.elf, image.path, given)
    bzimage = image.bzimage
    if bzimage is None:
        raise _cannot(image, "linux")
    if unpack:
        from kvmlite.boot.unpack import can_unpack
        from kvmlite.boot.unpack import unpack as unpack_bzimage

        # Of a compression kvmlite does not know, the kernel brings the decompressor itself.
        if can_unpack(image):
            with unpack_bzimage(image, cache_dir) as vmlinux:
                return linux.load_vmlinux(memory, vmlinux.fd, vmlinux.elf, image.path, given, bzimage=bzimage)
    return linux.load_bzimage(memory, image.fd, bzimage, image.path, given)


def _cannot(image: KernelImage, protocol: str) -> ImageError:
    ways = ", ".join(image.protocols) or "nothing"
    return ImageError(f"{image.path}: cannot be started by the {protocol} protocol", hint=f"it offers: {ways}")
