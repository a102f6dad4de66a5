"""``--timings`` and ``--explain-boot``: where the time went, for people or as JSON, on stderr."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.machine.outcome import ExitReport, MachineStatistics

# The order in which a run passes them; each line shows the time since the one before.
STAGES = (
    "process start", "import", "kvm ready", "kernel loaded", "first KVM_RUN", "kernel entry", "init", "agent ready",
    "parts set up",
    "command started", "first result", "ended",
)  # fmt: skip
MOST_ADDRESSES = 12


def explain(report: ExitReport, *, timings: bool, boot: bool, as_json: bool) -> None:
    """Print what was asked for."""
    if as_json:
        _print_json(report)
        return
    lines: list[str] = []
    if timings:
        lines += _timing_lines(report.spans)
    if boot:
        lines += _boot_lines(report)
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def _ordered(spans: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(((name, at) for name, at in spans.items() if name in STAGES), key=lambda entry: entry[1])


def _timing_lines(spans: dict[str, float]) -> list[str]:
    ordered = _ordered(spans)
    if not ordered:
        return []
    start = before = ordered[0][1]
    lines = [f"{'stage':<18}{'at ms':>10}{'took ms':>10}"]
    for name, at in ordered:
        lines.append(f"{name:<18}{(at - start) * 1e3:>10.1f}{(at - before) * 1e3:>10.1f}")
        before = at
    return lines


def _boot_lines(report: ExitReport) -> list[str]:
    statistics, spans = report.statistics, report.spans
    lines = [
        f"exits to user space: {statistics.exits}, of which Python saw {statistics.python_exits}",
        f"bytes on the serial console: {statistics.serial_bytes}"
        + (
            " (each is an exit: quiet on the kernel's command line saves most)"
            if statistics.serial_bytes > 2000
            else ""
        ),
    ]
    if "init" in spans and "first KVM_RUN" in spans:
        lines.append(f"from the first instruction to init: {(spans['init'] - spans['first KVM_RUN']) * 1e3:.1f} ms")
    lines += [
        f"  {count:>8}  {name}" for name, count in sorted(statistics.exits_by_reason.items(), key=lambda e: -e[1])
    ]
    lines.append(f"{'reads':>10}{'writes':>10}  address")
    lines += _address_lines(statistics)
    return lines


def _address_lines(statistics: MachineStatistics) -> list[str]:
    lines = [
        f"{entry.reads:>10}{entry.writes:>10}  {entry.kind} {entry.address:#x} {entry.owner or '(nobody)'}"
        for entry in statistics.addresses[:MOST_ADDRESSES]
    ]
    left = statistics.addresses[MOST_ADDRESSES:]
    if left:
        total = sum(entry.reads + entry.writes for entry in left)
        lines.append(f"{'':>20}  and {len(left)} more addresses with {total} exits")
    return lines


def _print_json(report: ExitReport) -> None:
    import dataclasses
    import json

    from kvmlite.machine.outcome import describe

    statistics = report.statistics
    ordered = _ordered(report.spans)
    start = ordered[0][1] if ordered else 0.0
    document = {
        "version": 1,
        "outcome": type(report.outcome).__name__,
        "description": describe(report.outcome),
        "exit_code": report.exit_code,
        "stages_ms": {name: round((at - start) * 1e3, 3) for name, at in ordered},
        "exits": statistics.exits,
        "python_exits": statistics.python_exits,
        "serial_bytes": statistics.serial_bytes,
        "exits_by_reason": statistics.exits_by_reason,
        "addresses": [dataclasses.asdict(entry) for entry in statistics.addresses],
    }
    sys.stderr.write(json.dumps(document) + "\n")
