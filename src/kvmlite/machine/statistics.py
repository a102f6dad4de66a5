"""Sums up what the vCPUs counted."""

from __future__ import annotations

from kvmlite.abi.kvm import exit_reason_name
from kvmlite.machine.outcome import AddressCount, MachineStatistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmlite.bus import Bus
    from kvmlite.kvm.vcpu import Vcpu
    from kvmlite.machine.builder import Parts


def collect(parts: Parts, vcpus: Sequence[Vcpu]) -> MachineStatistics:
    """Statistics over all vCPUs; they have stopped."""
    if not vcpus:
        return MachineStatistics()
    reasons: dict[str, int] = {}
    for vcpu in vcpus:
        for reason, count in enumerate(vcpu.stats.reasons):
            if count:
                name = exit_reason_name(reason)
                reasons[name] = reasons.get(name, 0) + count
    return MachineStatistics(
        exits=sum(int(vcpu.stats.exits) for vcpu in vcpus),
        python_exits=sum(int(vcpu.stats.python_exits) for vcpu in vcpus),
        exits_by_reason=reasons,
        addresses=_addresses(parts.bus, vcpus),
        serial_bytes=parts.console.output_total,
    )


def _addresses(bus: Bus, vcpus: Sequence[Vcpu]) -> tuple[AddressCount, ...]:
    counts: dict[tuple[int, bool], list[int]] = {}
    for vcpu in vcpus:
        for entry in vcpu.stats.addresses:
            if entry.used:
                total = counts.setdefault((int(entry.address), bool(entry.is_mmio)), [0, 0])
                total[0] += int(entry.reads)
                total[1] += int(entry.writes)
    found = []
    for (address, is_mmio), (reads, writes) in counts.items():
        owner = bus.find_mmio(address) if is_mmio else bus.find_port(address)
        found.append(
            AddressCount(
                address=address,
                kind="mmio" if is_mmio else "port",
                owner=owner.name if owner else "",
                reads=reads,
                writes=writes,
            )
        )
    found.sort(key=lambda entry: -(entry.reads + entry.writes))
    return tuple(found)
