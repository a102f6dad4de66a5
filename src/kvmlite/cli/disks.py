"""``--disk PATH[,WORD][,NAME=VALUE]...``: disks of a guest from the command line."""

from __future__ import annotations

from kvmlite.devices.blk import Disk
from kvmlite.devices.vhost_user_blk import FORMATS, FormattedDisk
from kvmlite.errors import ConfigError
from kvmlite.sizes import parse_count, parse_seconds, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_WORDS: dict[str, dict[str, object]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "direct": {"direct": True},
    "overlay": {"overlay": "discard"},
}
_NAMES = ("serial", "queues", "engine", "iops", "bandwidth", "burst", "format")
_HINT = (
    "write PATH, then any of ,ro ,direct ,overlay ,serial=TEXT ,queues=N ,engine=NAME ,iops=N ,bandwidth=SIZE ,burst=TIME "
    ",format=NAME; a comma in PATH twice"
)
_RAW_ONLY = {
    "serial": "serial",
    "overlay": "overlay",
    "engine": "engine",
    "iops": "iops",
    "bandwidth": "bandwidth",
    "burst_s": "burst",
}


def parse_disk(text: str) -> Disk | FormattedDisk:
    """Read one ``--disk``.

    Raises:
        ConfigError: It is not of this form, or its parts do not go together.
    """
    path, *words = (part.replace("\x00", ",") for part in text.replace(",,", "\x00").split(","))
    values: dict[str, Any] = {"path": path}
    for word in words:
        name, has_value, value = word.partition("=")
        if not has_value and word in _WORDS:
            values.update(_WORDS[word])
        elif has_value and name in _NAMES:
            values.update(_read_value(name, value))
        else:
            raise ConfigError(f"--disk {text!r}: {word!r} means nothing", hint=_HINT)
    if not path:
        raise ConfigError(f"--disk {text!r} names no file", hint=_HINT)
    format = values.pop("format", "")
    if format in ("", "raw"):
        _check_suffix(path, is_told=bool(format))
        return Disk(**values)
    for field, option in _RAW_ONLY.items():
        if field in values:
            raise ConfigError(f"--disk {text!r}: {option} is for raw images", hint="leave it out, or convert the image")
    return FormattedDisk(format=format, **values)


def _check_suffix(path: str, *, is_told: bool) -> None:
    """A raw disk that is called otherwise is most likely not meant to be raw. What is in it is no evidence."""
    suffix = path.rpartition(".")[2].lower()
    if suffix in FORMATS and suffix != "raw" and not is_told:
        raise ConfigError(
            f"--disk {path!r} is not said to be {suffix}, and without that a disk is raw",
            hint=f"add ,format={suffix} or ,format=raw",
        )


def _read_value(name: str, value: str) -> dict[str, object]:
    what = f"--disk {name}"
    match name:
        case "serial" | "engine":
            return {name: value}
        case "bandwidth":
            return {"bandwidth": parse_size(value, what)}
        case "burst":
            return {"burst_s": parse_seconds(value, what)}
        case "format":
            if value not in FORMATS:
                raise ConfigError(f"--disk format {value!r} is unknown", hint=f"there are: {', '.join(FORMATS)}")
            return {"format": value}
        case _:
            return {name: parse_count(value, what)}
