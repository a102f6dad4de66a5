"""One thing ``kvmlite doctor`` found out about the host."""

from __future__ import annotations

from kvmlite.records import dataclass

OK = "ok"
INFO = "info"
WARN = "warn"
FAIL = "fail"

STATUSES = (OK, INFO, WARN, FAIL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at and what it means. All texts are one line.

    Attributes:
        id: Stable name for scripts (``kvm-device``).
        status: ``ok``; ``info``, worth knowing and nothing to do; ``warn``, microVMs run, but slower or with less;
            ``fail``, no microVM can run.
        seen: What was seen.
        meaning: What follows from it.
        fix: The command, or what else to do; with ``info``, only if wanted. Empty if there is nothing to do.
    """

    id: str
    status: str
    seen: str
    meaning: str
    fix: str = ""
