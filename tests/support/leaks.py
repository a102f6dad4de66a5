"""What a process holds: descriptors, threads, children, mappings. Two looks and a difference make a leak test."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

_PAGE_SIZE = 4096
_HUGE_PAGE_SIZE = 2 << 20
_GRACE_S = 30.0  # a thread that has said goodbye still needs a moment to leave /proc


def open_descriptors() -> set[tuple[int, str]]:
    """``(fd, what it is)`` of this process, without the one used to look."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the directory that was being listed
            continue
    return found


def threads() -> set[tuple[int, str]]:
    """``(thread id, name)`` of this process; KVM's workers on our behalf are among them."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found.add((int(task), Path("/proc/self/task", task, "comm").read_text().strip()))
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
    return found


def children() -> set[int]:
    """Process ids of this process's children, zombies too."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found.update(map(int, Path("/proc/self/task", task, "children").read_text().split()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def machine_mappings() -> set[tuple[str, str]]:
    """``(address range, what)`` of mappings that belong to a machine: vCPUs' shared pages and guest RAM.

    Anonymous guest RAM has no name. It is what starts at a 2 MiB boundary right after a no-access page, has whole MiB,
    and is not a thread's stack, which may look the same (alone, or together with a heap above it that the kernel took
    for one mapping with it) and which the C library keeps for the next thread.
    """
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack_size = limit if limit != resource.RLIM_INFINITY else 2 << 20
    found = set()
    guard_end = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, _, _, _, *name = line.split(None, 5)
        start, end = (int(part, 16) for part in span.split("-"))
        kind = name[0] if name else ""
        aligned = start == guard_end and start % _HUGE_PAGE_SIZE == 0
        has_whole_mib = (end - start) % (1 << 20) == 0
        if not kind and access == "rw-p" and aligned and has_whole_mib and end - start != stack_size:
            kind = "guest RAM"
        if "kvm-vcpu" in kind or "kvmlite-ram" in kind or kind == "guest RAM":
            found.add((span, kind))
        guard_end = end if access == "---p" and end - start == _PAGE_SIZE else 0
    return found


class Holdings:
    """What the process held when this was made.

    ``gains()`` says what came on top since and stays: everything that is still there after a short grace period.
    """

    def __init__(self, *, mappings: bool = False) -> None:
        self._looks: dict[str, Callable[[], set[object]]] = {
            "descriptors": lambda: set(open_descriptors()),
            "threads": lambda: set(threads()),
            "children": lambda: set(children()),
        }
        if mappings:
            self._looks["mappings"] = lambda: set(machine_mappings())
        self._before = {name: look() for name, look in self._looks.items()}

    def gains(self) -> dict[str, list[object]]:
        """``kind -> new things``; empty if nothing was left behind."""
        deadline = time.monotonic() + _GRACE_S
        while True:
            gained = {name: sorted(look() - self._before[name], key=str) for name, look in self._looks.items()}
            gained = {name: things for name, things in gained.items() if things}
            if not gained or time.monotonic() > deadline:
                return gained
            time.sleep(0.005)
