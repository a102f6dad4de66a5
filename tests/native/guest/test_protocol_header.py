"""agent/protocol.h and protocol.py say the same."""

from __future__ import annotations

import re

import pytest

from kvmlite.guest import build_agent, protocol

HEADER = (build_agent.SOURCES / "protocol.h").read_text()
CONSTANTS = {name: int(value) for name, value in re.findall(r"\b([A-Z][A-Z_]+) = (\d+),", HEADER)}
RENAMED = {
    "PROTOCOL_VERSION": protocol.VERSION,
    "PROTOCOL_HEADER_SIZE": protocol.HEADER.size,
    "PROTOCOL_PAYLOAD_MAX": protocol.PAYLOAD_MAX,
    "PROTOCOL_DATA_CHUNK": protocol.DATA_CHUNK,
    "PROTOCOL_EXECS_MAX": protocol.EXECS_MAX,
    "CHANNEL_AUTO": 0,
    **{f"CHANNEL_{name.upper()}": value for value, name in protocol.CHANNEL_NAMES.items()},
    **{f"SHUTDOWN_{name.upper()}": value for name, value in protocol.SHUTDOWN_KINDS.items()},
}


def test_header_has_all_message_types() -> None:
    assert sum(name.startswith("MESSAGE_") for name in CONSTANTS) == 24


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_is_the_same_in_both_languages(name: str) -> None:
    expected = RENAMED[name] if name in RENAMED else getattr(protocol, name.removeprefix("MESSAGE_"))
    assert CONSTANTS[name] == expected


def test_sizes_written_as_products_are_the_same() -> None:
    assert "PROTOCOL_EXEC_MAX = 1024 * 1024," in HEADER
    assert "PROTOCOL_STDIN_WINDOW = 256 * 1024," in HEADER
    assert (protocol.EXEC_MAX, protocol.STDIN_WINDOW) == (1024 * 1024, 256 * 1024)
