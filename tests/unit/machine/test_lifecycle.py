"""The table of states, and the latch."""

from __future__ import annotations

import threading

import pytest

from kvmlite.errors import StateError
from kvmlite.machine.lifecycle import TRANSITIONS, Latch, Lifecycle

STATES = ("new", "ready", "running", "paused", "stopped")
MOVES = {
    ("build", "new"): "ready",
    ("start", "ready"): "running",
    ("pause", "running"): "paused",
    ("resume", "paused"): "running",
    ("stop", "new"): "stopped",
    ("stop", "ready"): "stopped",
    ("stop", "running"): "stopped",
    ("stop", "paused"): "stopped",
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("verb", sorted(TRANSITIONS))
def test_every_verb_in_every_state(verb: str, state: str) -> None:
    lifecycle = Lifecycle()
    lifecycle.state = state
    if (verb, state) in MOVES:
        lifecycle.go(verb)
        assert lifecycle.state == MOVES[verb, state]
    else:
        with pytest.raises(StateError, match=f"cannot {verb} a machine that is {state}"):
            lifecycle.go(verb)
        assert lifecycle.state == state


def test_a_machine_begins_as_new() -> None:
    assert Lifecycle().state == "new"


def test_only_one_of_many_threads_makes_the_move() -> None:
    lifecycle = Lifecycle()
    won: list[str] = []
    barrier = threading.Barrier(8)

    def build() -> None:
        barrier.wait()
        try:
            lifecycle.go("build")
        except StateError:
            return
        won.append("one")

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == ["one"]


def test_a_latch_lets_nobody_through_until_set() -> None:
    latch = Latch()
    assert not latch.is_set
    assert latch.wait(0) is False
    assert latch.wait(-1.0) is False
    latch.set()
    latch.set()
    assert latch.is_set
    assert latch.wait() is True
    assert latch.wait(0) is True


def test_a_latch_wakes_every_waiter_whoever_sets_it() -> None:
    for _ in range(20):
        latch = Latch()
        through: list[bool] = []
        waiters = [
            threading.Thread(target=lambda latch=latch, out=through: out.append(latch.wait(30))) for _ in range(4)
        ]
        setters = [threading.Thread(target=latch.set) for _ in range(4)]
        for thread in (*waiters, *setters):
            thread.start()
        for thread in (*waiters, *setters):
            thread.join()
        assert through == [True] * 4
