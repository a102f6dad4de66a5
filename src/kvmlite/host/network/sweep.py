"""Put back what guests changed on the host whose process was killed before it could."""

from __future__ import annotations

import os

from kvmlite.host.network import firewall, forwarding
from kvmlite.host.network.journal import Journal
from kvmlite.paths import runtime_home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.host.network.journal import Note


def journal_directory() -> str:
    """Where this user's notes lie."""
    return os.path.join(runtime_home(), "network")


def sweep() -> tuple[str, ...]:
    """Put back what dead processes have left in this network namespace; the names of their TAPs.

    Every start of a guest that needs the host's network does it first. Harmless when there is nothing.

    Raises:
        HostError: Something could not be put back; its note stays, for the next sweep.
    """
    directory = journal_directory()
    if not os.path.isdir(directory):
        return ()
    journal = Journal(directory)
    with journal.locked():
        return sweep_locked(journal)


def notes() -> tuple[Note, ...]:
    """What guests in this network namespace have changed, of living and of dead processes; by name.

    Raises:
        HostError: The notes cannot be read.
    """
    directory = journal_directory()
    if not os.path.isdir(directory):
        return ()
    journal = Journal(directory)
    with journal.locked():
        return tuple(journal.notes())


def sweep_locked(journal: Journal) -> tuple[str, ...]:
    """``sweep`` for a caller that holds the journal's lock."""
    dead = [note for note in journal.notes() if not note.is_alive()]
    for note in dead:
        put_back(journal, note)
    return tuple(note.name for note in dead)


def put_back(journal: Journal, note: Note) -> None:
    """Undo what a note says, and strike it out. Call with the lock held.

    Raises:
        HostError: The host refused.
    """
    firewall.remove_table(note.name)
    others = [other for other in journal.notes() if other.name != note.name]
    if note.turned_on_forwarding and not any(other.turned_on_forwarding for other in others):
        forwarding.turn(False)
    journal.remove(note.name)
