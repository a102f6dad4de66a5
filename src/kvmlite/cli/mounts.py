"""``--mount SRC:DST[:MODE[,NAME=VALUE]...]`` and ``--root``: the host's directories from the command line."""

from __future__ import annotations

from kvmlite.errors import ConfigError
from kvmlite.sandbox.mounts import MODES, HostRoot, Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HINT = "write SRC:DST, then one of :ro :rw :overlay, then any of ,xattr ,cache=auto ,cache=always ,cache=none"


def parse_mount(text: str) -> Mount:
    """Read one ``--mount``. SRC may have colons in it, DST may not.

    Raises:
        ConfigError: It is not of this form.
    """
    rest, colon, last = text.rpartition(":")
    values: dict[str, Any] = {}
    if colon and last.split(",")[0] in MODES:
        values = _read_options(text, last)
        rest, colon, last = rest.rpartition(":")
    if not colon or not rest or not last.startswith("/"):
        raise ConfigError(f"--mount {text!r} is not of the form SRC:DST[:ro|rw|overlay]", hint=_HINT)
    if last.partition(",")[2].split(",")[0] in MODES:
        raise ConfigError(f"--mount {text!r}: the mode comes behind a colon, not a comma", hint=_HINT)
    return Mount(source=rest, target=last, **values)


def _read_options(text: str, words: str) -> dict[str, object]:
    mode, *options = words.split(",")
    values: dict[str, object] = {"mode": mode}
    for option in options:
        name, has_value, value = option.partition("=")
        if option == "xattr":
            values["xattr"] = True
        elif name == "cache" and has_value:
            values["cache"] = value
        else:
            raise ConfigError(f"--mount {text!r}: {option!r} means nothing", hint=_HINT)
    return values


def parse_root(text: str) -> HostRoot:
    """Read ``--root``.

    Raises:
        ConfigError: It is neither ``host`` nor a path with a slash in it.
    """
    if text == "host":
        return HostRoot()
    if "/" in text:
        return HostRoot(path=text)
    raise ConfigError(f"--root {text!r} is unknown", hint=f"write --root host, or for a directory --root ./{text}")
