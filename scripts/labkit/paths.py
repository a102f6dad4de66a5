"""Where things are: the project tree, and the cache that outlives a run."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
VENV = PROJECT / ".venv"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmlite" / "lab"
#: One directory per Debian package, each with ``boot/`` and ``lib/modules/``.
KERNELS = CACHE / "kernels"
DEFAULT_KERNEL = "linux-image-cloud-amd64"


class LabError(Exception):
    """The lab cannot come up; the text says why and what to do."""


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold one lock of the cache, so that two runs do not build the same thing twice."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
