from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.net import Plug


@pytest.fixture
def plug() -> Iterator[Callable[..., Plug]]:
    """Make a card and bring its driver up: ``plug(framing, features=None, port={}, rig={}, **spec)``."""
    with ExitStack() as stack:

        def make(
            framing: str = "tap",
            *,
            queue_pairs: int = 1,
            features: int | None = None,
            port: dict[str, Any] | None = None,
            rig: dict[str, Any] | None = None,
            **spec: Any,
        ) -> Plug:
            made = Plug(stack, framing, queue_pairs, port or {}, rig or {}, **spec)
            made.rig.start(features)
            return made

        yield make
