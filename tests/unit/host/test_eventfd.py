"""eventfd with an owner."""

from __future__ import annotations

import os
import select

from kvmlite.host.eventfd import EventFd


def is_readable(event: EventFd) -> bool:
    return bool(select.select([event.fd], [], [], 0)[0])


def test_a_signal_makes_it_readable_until_drained() -> None:
    event = EventFd()
    assert not is_readable(event)
    event.signal()
    event.signal()
    assert is_readable(event)
    assert event.drain()
    assert not is_readable(event)
    assert not event.drain()
    event.close()


def test_it_is_closed_on_exec_and_never_blocks() -> None:
    event = EventFd()
    assert not os.get_inheritable(event.fd)
    assert not os.get_blocking(event.fd)
    event.close()


def test_closing_twice_is_harmless() -> None:
    event = EventFd()
    event.close()
    event.close()
    assert event.fd == -1
