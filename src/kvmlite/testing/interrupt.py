"""An interrupt line nobody listens to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeInterrupt:
    """Counts what a device raises.

    Attributes:
        queue: Times ``raise_queue`` was called.
        config: Times ``raise_config`` was called.
    """

    def __init__(self) -> None:
        self.queue = 0
        self.config = 0

    def raise_queue(self) -> None:
        """Count."""
        self.queue += 1

    def raise_config(self, update: Callable[[], None] | None = None) -> None:
        """Make the change and count."""
        if update is not None:
            update()
        self.config += 1
