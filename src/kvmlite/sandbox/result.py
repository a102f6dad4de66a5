"""What came of a command in a guest."""

from __future__ import annotations

from kvmlite.errors import KvmliteError
from kvmlite.machine.outcome import Exited, describe
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.machine.outcome import ExitReport, Outcome


class CommandFailed(KvmliteError):
    """A command did not succeed, and the caller asked to be told so.

    Attributes:
        result: All that is known.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.command}: {describe(result.outcome)}")
        self.result = result


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A command's end.

    Attributes:
        command: What ran, for messages.
        outcome: How it ended: ``Exited(code)`` if the command's own status came, else what happened to the guest.
        stdout_bytes, stderr_bytes: All it printed.
        report: The machine's report: stages, exits, console.
    """

    command: str
    outcome: Outcome
    stdout_bytes: bytes
    stderr_bytes: bytes
    report: ExitReport

    @property
    def exit_code(self) -> int | None:
        """The command's exit status (128 + signal if one killed it); None if it never came. Never 0 for want of one."""
        return self.outcome.code if isinstance(self.outcome, Exited) else None

    @property
    def ok(self) -> bool:
        """It exited with status 0."""
        return self.exit_code == 0

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are no UTF-8 are replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; bytes that are no UTF-8 are replaced."""
        return self.stderr_bytes.decode(errors="replace")

    def check(self) -> Result:
        """Itself if it is ``ok``.

        Raises:
            CommandFailed: It is not.
        """
        if not self.ok:
            raise CommandFailed(self)
        return self
