"""A terminal that belongs to a guest for a while, and is as it was afterwards."""

from __future__ import annotations

import os
import pty
import signal
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from kvmlite.cli.terminal import GuestTerminal


@pytest.fixture
def terminal() -> Iterator[int]:
    leader, follower = pty.openpty()
    yield follower
    os.close(leader)
    os.close(follower)


@pytest.mark.parametrize("raw", [False, True])
def test_keys_come_one_by_one_and_ctrl_c_interrupts_unless_raw(terminal: int, raw: bool) -> None:
    before = termios.tcgetattr(terminal)
    with GuestTerminal(terminal, raw=raw):
        local = termios.tcgetattr(terminal)[3]
        assert not local & (termios.ICANON | termios.ECHO)
        assert bool(local & termios.ISIG) != raw
    assert termios.tcgetattr(terminal) == before


@pytest.mark.parametrize("raw", [False, True])
def test_a_signal_right_after_the_setting_puts_it_back(
    terminal: int, raw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_mode, before = termios.tcsetattr, termios.tcgetattr(terminal)

    def interrupted(*arguments: Any) -> None:
        set_mode(*arguments)
        monkeypatch.undo()
        raise SystemExit(143)

    for module in ("termios", "tty"):
        monkeypatch.setattr(f"{module}.tcsetattr", interrupted)
    with pytest.raises(SystemExit), GuestTerminal(terminal, raw=raw):
        pytest.fail("the signal was lost")
    assert termios.tcgetattr(terminal) == before


def test_a_change_of_the_window_is_told_until_the_end(terminal: int) -> None:
    told: list[tuple[int, int]] = []
    before = signal.getsignal(signal.SIGWINCH)
    with GuestTerminal(terminal, raw=True) as guest:
        guest.on_resize(lambda *size: told.append(size))
        termios.tcsetwinsize(terminal, (30, 100))
        os.kill(os.getpid(), signal.SIGWINCH)
        assert (told, guest.size()) == ([(100, 30)], (100, 30))
    assert signal.getsignal(signal.SIGWINCH) == before
