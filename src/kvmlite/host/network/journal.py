"""Notes on what guests have changed on the host, so that it can be put back, also after a SIGKILL.

Most of it goes away with the process: a TAP with its addresses, routes and place in a bridge, and passt. What does not,
the tables of nftables and the switch for IP forwarding, is written down here before it is done: one file per guest,
with the process that has it. Whoever holds the lock may act on the notes of processes that are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os

from kvmlite.errors import HostError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What one guest's network has changed.

    Attributes:
        name: Of the TAP, of the nftables table of family ``ip``, and of the note.
        pid, start_ticks: The process whose guest it is; the second tells it from a later one with the same number.
        namespace: Inode of the network namespace it was done in.
        subnet: Of the guest, in CIDR form: nobody else takes it.
        turned_on_forwarding: IP forwarding was off, and is to be off again when no note says this any more.
    """

    name: str
    pid: int
    start_ticks: int
    namespace: int
    subnet: str
    turned_on_forwarding: bool

    def is_alive(self) -> bool:
        """Whether its process still runs."""
        return start_ticks(self.pid) == self.start_ticks


class Journal:
    """The notes of all guests of this user.

    Args:
        directory: Where they lie; made if it is missing.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other processes from reading and writing notes, and from what the notes are about.

        Raises:
            HostError: The directory cannot be made, or is not ours.
        """
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(self._directory, mode=0o700, exist_ok=True)
                if os.stat(self._directory).st_uid != os.geteuid():
                    raise PermissionError(1, "it belongs to another user")
                lock = os.open(os.path.join(self._directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise HostError(f"{self._directory}: {error.strerror}", error.errno or 0) from error
            yield

    def notes(self) -> list[Note]:
        """All notes on this network namespace, by name. Call with the lock held."""
        here = namespace()
        return [note for note in map(self._read, self._names()) if note is not None and note.namespace == here]

    def write(self, note: Note) -> None:
        """Write a note down; it is there, whole, when this returns. Call with the lock held."""
        import dataclasses

        path = self._path(note.name)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(note), file)
        os.rename(f"{path}.new", path)

    def remove(self, name: str) -> None:
        """Strike a note out: what it says has been put back. Call with the lock held."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def _names(self) -> list[str]:
        try:
            files = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return sorted(file.removesuffix(_SUFFIX) for file in files if file.endswith(_SUFFIX))

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name + _SUFFIX)

    def _read(self, name: str) -> Note | None:
        try:
            with open(self._path(name), encoding="utf-8") as file:
                return Note(**json.load(file))
        except (ValueError, TypeError):  # of another version, or not ours
            return None


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the host did; -1 if there is none with this number."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def namespace() -> int:
    """Inode of this thread's network namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino
