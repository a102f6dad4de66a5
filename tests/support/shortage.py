"""A host that runs out of something at the first place that wants one, at the second, the third ...: nothing may be left.

    for shortage in shortages(of_descriptors):
        with shortage, VirtioRig(factory) as rig:
            rig.start()

The body runs with room for nothing, for one, for two ..., until it has got through. What it raises before is the shortage's
doing; whatever it holds then has been left behind.
"""

from __future__ import annotations

import _thread
import errno
import itertools
import mmap
import os
import resource
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any
from unittest import mock

import pytest

from kvmlite.errors import KvmliteError
from support.leaks import Holdings, open_descriptors

Kind = Callable[[int], AbstractContextManager[None]]

_MOST = 200  # no body here makes as many of anything


class Shortage:
    """One try. A context manager that keeps to itself what the shortage makes of its body."""

    def __init__(self, kind: Kind, room: int) -> None:
        self.error: BaseException | None = None
        self._place = kind(room)

    def __enter__(self) -> None:
        self._place.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._place.__exit__(None, None, None)
        self.error = error
        return isinstance(error, (OSError, RuntimeError, MemoryError, KvmliteError))


def shortages(kind: Kind) -> Iterator[Shortage]:
    """Shortages that become smaller, until one was none. Each is looked at afterwards."""
    for room in range(_MOST):
        before = Holdings(mappings=True)
        shortage = Shortage(kind, room)
        yield shortage
        gains = before.gains()
        if gains:
            pytest.fail(f"with room for {room}, left behind: {gains}", pytrace=False)
        if shortage.error is None:
            return
        shortage.error = shortage.error.with_traceback(None)  # frames hold things
    pytest.fail(f"room for {_MOST} was not enough: {shortage.error!r}")


@contextmanager
def of_descriptors(room: int) -> Iterator[None]:
    """So many more descriptors can be opened, by whichever thread, and in C as well."""
    taken = {fd for fd, _ in open_descriptors()}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (fd for fd in itertools.count() if fd not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, room, None)), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _no_descriptor() -> BaseException:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _no_memory() -> BaseException:
    return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def _no_thread() -> BaseException:
    return RuntimeError("can't start new thread")


_MAKERS: tuple[tuple[Any, str, Callable[[], BaseException]], ...] = (
    (os, "dup", _no_descriptor),
    (os, "eventfd", _no_descriptor),
    (os, "memfd_create", _no_descriptor),
    (os, "open", _no_descriptor),
    (select, "epoll", _no_descriptor),
    (socket, "socketpair", _no_descriptor),
    (mmap, "mmap", _no_memory),
    (threading.Thread, "start", _no_thread),
    (_thread, "start_new_thread", _no_thread),
)


@contextmanager
def of_anything(room: int) -> Iterator[None]:
    """So many more calls succeed that make a descriptor, a mapping or a thread; the next one fails, and only that.

    Counted are calls of Python code on this thread alone: for a body whose other side is in this process.
    """
    caller = threading.get_ident()
    calls = itertools.count()

    def counted(function: Callable[..., Any], failure: Callable[[], BaseException]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == caller and next(calls) == room:
                raise failure()
            return function(*arguments, **options)

        return call

    with ExitStack() as patches:
        for owner, name, failure in _MAKERS:
            patches.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name), failure)))
        yield
