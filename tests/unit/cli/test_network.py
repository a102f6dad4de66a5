"""``--net``, ``--publish`` and ``--allow`` as options."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlite.cli.network import parse_network
from kvmlite.cli.options import read_plain
from kvmlite.cli.run import OPTIONS, cards
from kvmlite.devices.net import Net
from kvmlite.errors import ConfigError


def values(*arguments: str) -> dict[str, Any]:
    read = read_plain(OPTIONS, arguments)
    assert read is not None
    return read


def test_no_network_is_the_default() -> None:
    assert parse_network(values()) is None
    assert cards(values()) == ()


def test_a_network_is_a_card() -> None:
    network = parse_network(values("--net", "user", "--publish", "8080:80", "--allow", "10.0.0.0/8"))
    assert network is not None
    assert [type(device) for device in network.devices] == [Net]
    assert [type(device) for device in cards(values("--net", "nat,queues=2"))] == [Net]


@pytest.mark.parametrize("option", [("--publish", "8080:80"), ("--allow", "10.0.0.0/8")])
def test_options_of_a_network_need_one(option: tuple[str, str]) -> None:
    for function in (parse_network, cards):
        with pytest.raises(ConfigError, match="needs a network") as info:
            function(values(*option))
        assert "--net user" in info.value.hint
