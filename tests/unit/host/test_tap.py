"""TAP interfaces: made, opened by name, taken over; and what is said when that does not work."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable

import pytest
from support.namespace import in_network_namespace

from kvmlite.abi.tun import IFF_NO_PI, IFF_TAP, TUNSETIFF
from kvmlite.errors import ConfigError, HostError
from kvmlite.host.tap import adopt_tap, make_tap, open_tap


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def refusal(function: Callable[[], object]) -> HostError:
    with pytest.raises(HostError) as info:
        function()
    return info.value


@pytest.mark.parametrize("name", ["", "a" * 16, "a/b", "a b", "kvl%d"])
def test_a_name_no_interface_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no name of an interface"):
        open_tap(name)


def test_an_interface_that_is_not_there_is_named_with_the_way_to_make_it() -> None:
    error = refusal(lambda: open_tap("kvlnowhere"))
    assert (error.errno, str(error)) == (errno.ENODEV, "there is no interface kvlnowhere")
    assert "ip tuntap add kvlnowhere mode tap" in error.hint


def test_a_descriptor_that_is_no_tap_is_refused() -> None:
    with open("/dev/null", "rb") as file:
        assert "not one of a TAP" in str(refusal(lambda: adopt_tap(file.fileno())))


@pytest.mark.root
def test_a_tap_lives_as_long_as_it_is_open() -> None:
    def run() -> None:
        tap = make_tap("kvltest0", queue_pairs=2)
        assert (tap.name, len(tap.fds)) == ("kvltest0", 2)
        assert not any(os.get_blocking(fd) for fd in tap.fds)
        assert "vnet_hdr on" in ip("-d", "link", "show", "kvltest0")
        assert "multi_queue" in ip("-d", "link", "show", "kvltest0")
        assert "already" in str(refusal(lambda: make_tap("kvltest0")))
        tap.close()
        tap.close()
        assert "kvltest0" not in ip("link")

    in_network_namespace(run)


@pytest.mark.root
def test_an_existing_tap_is_opened_with_as_many_queues_as_it_was_made_for() -> None:
    def run() -> None:
        ip("tuntap", "add", "single", "mode", "tap")
        ip("tuntap", "add", "many", "mode", "tap", "multi_queue")
        first = open_tap("single")
        error = refusal(lambda: open_tap("single"))
        assert (error.errno, str(error)) == (errno.EBUSY, "single is in use by another process")
        first.close()
        error = refusal(lambda: open_tap("single", queue_pairs=2))
        assert "several queues" in str(error)
        assert "multi_queue" in error.hint
        for queue_pairs in (1, 3):
            tap = open_tap("many", queue_pairs=queue_pairs)
            assert len(tap.fds) == queue_pairs
            tap.close()
        assert "is no TAP interface" in str(refusal(lambda: open_tap("lo")))
        assert {name for _, name in socket.if_nameindex()} >= {"single", "many"}

    in_network_namespace(run)


@pytest.mark.root
def test_a_descriptor_is_taken_over_if_its_tap_is_of_the_right_kind() -> None:
    def run() -> None:
        mine = make_tap("kvltest0")
        theirs = adopt_tap(mine.fds[0])
        mine.close()
        assert theirs.name == "kvltest0"
        assert "kvltest0" in ip("link")
        theirs.close()
        bare = os.open("/dev/net/tun", os.O_RDWR)
        try:
            fcntl.ioctl(bare, TUNSETIFF, struct.pack("16sH22x", b"kvltest1", IFF_TAP | IFF_NO_PI))
            assert "IFF_VNET_HDR" in str(refusal(lambda: adopt_tap(bare)))
        finally:
            os.close(bare)

    in_network_namespace(run)


@pytest.mark.root
def test_without_rights_the_error_says_what_to_do() -> None:
    code = (
        "from kvmlite.host.tap import make_tap, open_tap\n"
        "from kvmlite.errors import HostError\n"
        "for function in (make_tap, open_tap):\n"
        "    try:\n"
        "        function('kvltest0' if function is make_tap else 'single')\n"
        "    except HostError as error:\n"
        "        print(error, '|', error.hint)\n"
    )

    def run() -> str:
        import sys

        ip("tuntap", "add", "single", "mode", "tap", "user", "12345")
        no_rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        done = subprocess.run(
            [*no_rights, sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30
        )
        return done.stdout

    first, second = in_network_namespace(run).splitlines()
    assert "not permitted" in first
    assert "--net user" in first
    assert "not permitted" in second
    assert "mode tap user $USER" in second
