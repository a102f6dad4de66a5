"""How a machine ended: a type, never a guess from log text, and what was seen on the way.

match report.outcome:
    case Exited(code=code): ...
    case Panicked(): ...
"""

from __future__ import annotations

from kvmlite.records import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """The guest said so itself: its command returned, or it wrote the debug-exit port.

    Attributes:
        code: 0-255.
        signal: Number of the signal that killed the command (``code`` is then 128 + signal), else 0.
    """

    code: int
    signal: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoweredOff:
    """The guest powered the machine off through ACPI without saying how its work went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """The guest asked for a reset (reboot); kvmlite ends the machine instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panicked:
    """The guest kernel panicked, and said so before it reset the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TripleFault:
    """A vCPU could not deliver an exception nor its double fault (KVM_EXIT_SHUTDOWN)."""

    vcpu_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOut:
    """The caller's limit ran out first."""

    limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hung:
    """The guest is alive to KVM but will never do anything again."""

    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The channel to the guest ended and the command's status never came. Never taken for success."""

    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmmError:
    """Something failed on our side of the machine: KVM refused to run on, or kvmlite has a bug."""

    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The caller stopped it."""

    detail: str = ""


Outcome = Exited | PoweredOff | Reset | Panicked | TripleFault | TimedOut | Hung | Lost | VmmError | Stopped


def describe(outcome: Outcome) -> str:
    """One line for people."""
    match outcome:
        case Exited(code=code, signal=0):
            return f"exited with status {code}"
        case Exited(signal=number):
            return f"was killed by signal {number}"
        case PoweredOff():
            return "the guest powered off"
        case Reset():
            return "the guest asked for a reset"
        case Panicked():
            return "the guest kernel panicked"
        case TripleFault(vcpu_id=vcpu_id):
            return f"triple fault on vCPU {vcpu_id}"
        case TimedOut(limit_s=limit_s):
            return f"ran into the time limit of {limit_s:g} s"
        case Hung(detail=detail):
            return f"the guest hangs: {detail}"
        case Lost(detail=detail):
            return f"lost the guest: {detail}"
        case VmmError(error=error):
            return f"the machine failed: {error}"
        case Stopped(detail=detail):
            return f"stopped{': ' if detail else ''}{detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressCount:
    """Exits at one address.

    Attributes:
        address: Port or guest-physical address.
        kind: ``port`` or ``mmio``.
        owner: Name of the device, or "" if nobody is there.
    """

    address: int
    kind: str
    owner: str
    reads: int
    writes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineStatistics:
    """What the machine did, summed over its vCPUs.

    Attributes:
        exits: Returns of KVM_RUN to user space.
        python_exits: Of these, handed up from C to Python.
        exits_by_reason: ``KVM_EXIT_*`` name -> count; only those that happened.
        addresses: Exits by port and address, most frequent first.
        serial_bytes: Bytes written to the console port.
    """

    exits: int = 0
    python_exits: int = 0
    exits_by_reason: dict[str, int] = field(default_factory=dict)
    addresses: tuple[AddressCount, ...] = ()
    serial_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitReport:
    """What ``Machine.wait`` returns.

    Attributes:
        outcome: One of the classes above.
        console: Last 64 KiB of what the guest wrote to its first serial port.
        spans: Monotonic seconds at which each named stage was reached.
        console_error: Why its output could not be written to ``console_fd`` to the end; None if it could, or if the
            caller had ended it before.
    """

    outcome: Outcome
    console: bytes
    spans: dict[str, float]
    statistics: MachineStatistics
    console_error: OSError | None = None

    @property
    def exit_code(self) -> int | None:
        """The guest's own exit status, or None if it gave none."""
        return self.outcome.code if isinstance(self.outcome, Exited) else None
