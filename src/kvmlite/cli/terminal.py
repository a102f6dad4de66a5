"""The user's terminal while it belongs to a guest."""

from __future__ import annotations

import os
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class GuestTerminal:
    """A terminal that passes keys on one by one, unseen. A context manager; leaving it puts the old settings back.

    Args:
        fd: The terminal; the caller's.
        raw: Every key is the guest's, Ctrl-C too, and nothing it prints is changed; else Ctrl-C still interrupts us.
    """

    def __init__(self, fd: int, *, raw: bool) -> None:
        self._fd = fd
        self._raw = raw
        self._saved = termios.tcgetattr(fd)
        self._old_handler: Any = None

    def __enter__(self) -> GuestTerminal:
        try:
            self._pass_keys_on()
        except BaseException:  # a signal may end us between the setting and the block that would undo it
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._old_handler is not None:
            import signal

            signal.signal(signal.SIGWINCH, self._old_handler)

    def _pass_keys_on(self) -> None:
        if self._raw:
            import tty

            tty.setraw(self._fd, termios.TCSADRAIN)
            return
        mode = termios.tcgetattr(self._fd)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)

    def _restore(self) -> None:
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        size = os.get_terminal_size(self._fd)
        return size.columns, size.lines

    def on_resize(self, function: Callable[[int, int], None]) -> None:
        """Call ``function(columns, rows)`` whenever the window changes."""
        import signal

        self._old_handler = signal.signal(signal.SIGWINCH, lambda *_: function(*self.size()))
