"""What tests of several layers look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlite.host.facts import HostFiles


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[dict[str, str]], HostFiles]:
    """``tree({path: text})``: a host that has these files, and those of earlier calls."""

    def make(contents: dict[str, str]) -> HostFiles:
        for name, text in contents.items():
            path = Path(tmp_path, name.lstrip("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return HostFiles(str(tmp_path))

    return make
