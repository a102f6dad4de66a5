"""The host's switch for IPv4 forwarding, which NAT needs."""

from __future__ import annotations

from kvmlite.errors import HostError

_SWITCH = "/proc/sys/net/ipv4/ip_forward"


def is_on() -> bool:
    """Whether this host forwards."""
    with open(_SWITCH, encoding="ascii") as file:
        return file.read().strip() != "0"


def turn(on: bool) -> None:
    """Turn it on or off.

    Raises:
        HostError: Not permitted, or /proc/sys is read-only, as in many containers.
    """
    write_setting(_SWITCH, "1" if on else "0")


def set_interface(name: str, setting: str, value: str, *, family: str = "ipv4") -> None:
    """Set net.FAMILY.conf.NAME.SETTING.

    Raises:
        HostError: As ``turn``.
    """
    write_setting(f"/proc/sys/net/{family}/conf/{name}/{setting}", value)


def write_setting(path: str, value: str) -> None:
    """Write to a file below /proc/sys.

    Raises:
        HostError: As ``turn``.
    """
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(value)
    except OSError as error:
        raise HostError(
            f"cannot write {value} to {path}: {error.strerror}", error.errno or 0,
            hint="NAT needs root and a /proc/sys that can be written to; --net user needs neither",
        ) from error  # fmt: skip
