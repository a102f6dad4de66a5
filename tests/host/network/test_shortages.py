"""A link that the host has not descriptors enough for leaves neither descriptor, process nor interface behind."""

from __future__ import annotations

import socket

import pytest
from support.namespace import Namespace
from support.shortage import of_descriptors, shortages

from kvmlite.host.loop import DeviceLoop
from kvmlite.host.network.egress import EgressRule
from kvmlite.host.network.link import Surroundings
from kvmlite.host.network.passt import UserLink
from kvmlite.host.network.publish import parse_publish, reserve
from kvmlite.host.tap import make_tap

pytestmark = [pytest.mark.root, pytest.mark.tools]

RULES = (EgressRule(network="192.0.2.0/24"),)
PUBLISHES = (parse_publish("18080:80"), parse_publish("18081:81"))


def interfaces(host: Namespace) -> list[str]:
    return host.call(lambda: sorted(name for _, name in socket.if_nameindex()))


def test_a_tap_of_several_queues(host: Namespace) -> None:
    for shortage in shortages(of_descriptors):
        with shortage:
            host.call(lambda: make_tap("kvl0", queue_pairs=4).close())
        assert interfaces(host) == ["lo"]


def test_user_networking(host: Namespace, loop: DeviceLoop) -> None:
    link = UserLink(mac=bytes.fromhex("525400123456"), publishes=PUBLISHES, rules=RULES)
    around = Surroundings(device="net0", queue_pairs=1, loop=loop, warn=lambda text: None)
    for shortage in shortages(of_descriptors):
        with shortage:
            host.call(lambda: link.open(around).close())


def test_published_ports(host: Namespace) -> None:
    for shortage in shortages(of_descriptors):
        with shortage:
            for holder in host.call(reserve, PUBLISHES):
                holder.close()
