"""Kernel command lines: check them, put them together, describe devices on them.

Spec: Documentation/admin-guide/kernel-parameters.rst. Words are split at spaces outside double quotes; dashes and
underscores in names are the same; what follows ``--`` goes to init.
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmlite.abi.layout import MmioWindow

_SINGLE = frozenset(("root", "rootfstype", "rootflags", "init", "rdinit", "nfsroot", "maxcpus", "nr_cpus", "panic"))
"""Parameters of which the kernel takes one: two different values are a mistake, not a wish."""


def encode_cmdline(cmdline: str | bytes) -> bytes:
    """The bytes the guest gets, without the terminating NUL.

    Raises:
        ConfigError: contains a NUL or a line break, which would cut or garble it.
    """
    data = os.fsencode(cmdline)
    for byte, name in (
        (b"\0", "a NUL byte"),
        (b"\n", "a line break"),
        (b"\r", "a carriage return"),
    ):
        at = data.find(byte)
        if at >= 0:
            raise ConfigError(
                f"command line contains {name} at offset {at}",
                hint="kernel arguments are separated by spaces",
            )
    return data


def split_cmdline(cmdline: str) -> list[str]:
    """The words of a command line; double quotes stay in place.

    Raises:
        ConfigError: a double quote is never closed.
    """
    words: list[str] = []
    word = ""
    is_quoted = False
    for character in cmdline:
        if character == '"':
            is_quoted = not is_quoted
        if character in " \t" and not is_quoted:
            if word:
                words.append(word)
            word = ""
        else:
            word += character
    if is_quoted:
        raise ConfigError(f"command line has an unclosed double quote: {cmdline!r}")
    return [*words, word] if word else words


def parameter_name(word: str) -> str:
    """Name of a parameter as the kernel compares it: before "=", without quotes, dashes as underscores."""
    return word.lstrip('"').partition("=")[0].replace("-", "_")


def compose_cmdline(user: str = "", *, defaults: Iterable[str] = (), devices: Iterable[MmioWindow] = ()) -> str:
    """Put a command line together.

    Args:
        user: What the user wants; comes last, so that it wins where the kernel takes the last.
        defaults: Words to add, each unless the user gives a parameter of that name.
        devices: virtio-mmio devices to describe, for kernels without ACPI.

    Raises:
        ConfigError: control characters, an unclosed quote, or one parameter with two values where the kernel
            takes one.
    """
    encode_cmdline(user)
    words = split_cmdline(user)
    at = words.index("--") if "--" in words else len(words)
    own, for_init = words[:at], words[at:]
    _refuse_contradictions(own)
    given = {parameter_name(word) for word in own}
    added = [word for word in defaults if parameter_name(word) not in given]
    described = [virtio_mmio_parameter(window) for window in devices]
    for word in described:
        if word in own:
            raise ConfigError(f"command line already has {word}", hint="kvmlite describes the devices: remove it")
    return " ".join([*added, *described, *own, *for_init])


def add_virtio_mmio(cmdline: str, windows: Iterable[MmioWindow]) -> str:
    """A command line that describes these devices too, for kernels without ACPI.

    Raises:
        ConfigError: see ``compose_cmdline``.
    """
    return compose_cmdline(cmdline, devices=windows)


def virtio_mmio_parameter(window: MmioWindow) -> str:
    """``virtio_mmio.device=4K@0xd0000000:5`` (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)."""
    size = f"{window.size >> 10}K" if window.size % 1024 == 0 else str(window.size)
    return f"virtio_mmio.device={size}@{window.gpa:#x}:{window.gsi}"


def _refuse_contradictions(words: list[str]) -> None:
    seen: dict[str, str] = {}
    for word in words:
        name = parameter_name(word)
        if name not in _SINGLE:
            continue
        if seen.setdefault(name, word) != word:
            raise ConfigError(
                f"command line has both {seen[name]} and {word}",
                hint=f"the kernel takes one {name}: remove the other",
            )
