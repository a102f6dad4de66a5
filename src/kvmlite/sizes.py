"""Amounts people write: memory and time."""

from __future__ import annotations

from kvmlite.errors import ConfigError

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def parse_memory_mib(text: str, what: str) -> int:
    """``256M``, ``1G``, ``1.5GiB``: whole MiB.

    Args:
        what: How an error calls it.

    Raises:
        ConfigError: It is not an amount of memory.
    """
    short = text.upper().removesuffix("IB").removesuffix("B")
    digits, unit = short[:-1], short[-1:]
    try:
        amount = float(digits) if unit in _UNITS else -1.0
    except ValueError:
        amount = -1.0
    if not 0 <= amount < 1 << 40:
        raise ConfigError(f"{what} {text!r} is not an amount of memory", hint="write a number with a unit: 256M, 1G")
    return int(amount * _UNITS[unit]) >> 20


def parse_size(text: str, what: str) -> int:
    """``512M``, ``10G``, ``1.5TiB``, or a plain number: bytes, a whole number of 512-byte sectors.

    Args:
        what: How an error calls it.

    Raises:
        ConfigError: It is not a size, or there is no sector in it: most likely a unit is missing.
    """
    short = text.upper().removesuffix("IB").removesuffix("B")
    scale = _UNITS.get(short[-1:], 1)
    digits = short[:-1] if scale > 1 else short
    try:
        amount = float(digits) if digits[:1].isdecimal() else -1.0
    except ValueError:
        amount = -1.0
    if not 0 < amount * scale < 1 << 62:
        raise ConfigError(f"{what} {text!r} is not a size", hint="write a number with a unit: 512M, 10G")
    if amount * scale < 512:
        raise ConfigError(f"{what} {text!r} is less than 512 bytes", hint="write a number with a unit: 512M, 10G")
    return int(amount * scale) >> 9 << 9


def parse_seconds(text: str, what: str) -> float:
    """``30``, ``1.5``, ``90s``, ``5m``, ``1h``: seconds.

    Raises:
        ConfigError: It is no positive time.
    """
    scale = _SECONDS.get(text[-1:])
    try:
        seconds = float(text[:-1] if scale else text) * (scale or 1)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ConfigError(f"{what} {text!r} is not a time", hint="write seconds, or 90s, 5m, 1h")
    return seconds


def parse_count(text: str, what: str) -> int:
    """A whole number.

    Raises:
        ConfigError: It is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{what} {text!r} is not a whole number") from None
