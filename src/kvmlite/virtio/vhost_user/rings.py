"""What can be told from the rings alone, when the process that served them has died."""

from __future__ import annotations

from collections import Counter
from struct import Struct, unpack

from kvmlite.errors import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.memory.guest_memory import GuestMemory
    from kvmlite.virtio.queue import QueueLayout

_INDEX = Struct("<H")


def ring_indices(memory: GuestMemory, layout: QueueLayout) -> tuple[int, int]:
    """Return (available index, used index).

    Raises:
        GuestFault: They are further apart than the queue is long.
    """
    used = int(_INDEX.unpack(memory.read(layout.used_gpa + 2, 2))[0])
    available = int(_INDEX.unpack(memory.read(layout.avail_gpa + 2, 2))[0])
    if (available - used) & 0xFFFF > layout.size:
        raise GuestFault(f"available index {available} and used index {used} are further apart than {layout.size}")
    return available, used


def heads_under_way(memory: GuestMemory, layout: QueueLayout, available: int, used: int) -> list[int]:
    """Return the heads of the chains that were made available and not given back.

    The indices say how many; which ones is certain if chains were given back in their order. Else it is the answer that
    fits most of the moments within the last round of both rings: every moment at which the queue was empty gives it.
    """
    count = (available - used) & 0xFFFF
    size = layout.size
    avail_ring = unpack(f"<{size}H", memory.read(layout.avail_gpa + 4, 2 * size))
    used_ring = unpack(f"<{2 * size}I", memory.read(layout.used_gpa + 4, 8 * size))[::2]
    newest = [avail_ring[(used + step) % size] for step in range(count)]
    balance = Counter(newest)
    answers = Counter([frozenset(newest)])
    # From the newest entries backwards: with each step one chain more that was offered and one that was given back.
    # Where the balance of every head is 0 or 1, all that went before may have been in balance.
    bad = sum(1 for value in balance.values() if value not in (0, 1))
    for step in range(1, min(size - count, used if used < size else size) + 1):
        for head, change in (avail_ring[(used - step) % size], 1), (used_ring[(used - step) % size], -1):
            bad -= balance[head] not in (0, 1)
            balance[head] += change
            bad += balance[head] not in (0, 1)
        if not bad:
            answers[frozenset(head for head, value in balance.items() if value)] += 1
    return sorted(answers.most_common(1)[0][0], key=lambda head: newest.index(head) if head in newest else -1)
