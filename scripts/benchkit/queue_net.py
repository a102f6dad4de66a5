"""``scripts/bench queue-net``: the data path of virtio-net alone, beside QEMU's microvm.

A guest of a few hundred bytes without a kernel drives the card from ring 3 over a TAP: it sends frames, which the host drops,
or sends back each frame that the host sends. Neither monitor uses vhost.
"""

from __future__ import annotations

import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchkit.lines import Lines
from benchkit.measure import QEMU_BARE_CPU, MeasureError
from benchkit.net import MAC, PROJECT, tap

RATIO_PROMISE = 1.0
GUEST = Path(__file__).resolve().parent / "guest"
LIMIT_S = 60.0
INTERFACE = "kvlbench0"
ETHERTYPE = 0x88B5
MACHINE = "microvm,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off,acpi=off"
# name: mode, frames in flight, bytes, frames
CELLS = {
    "send 64 B, 1": (0, 1, 64, 30_000),
    "send 64 B, 32": (0, 32, 64, 200_000),
    "send 1514 B, 32": (0, 32, 1514, 200_000),
    "echo 64 B": (1, 1, 64, 15_000),
    "echo 1514 B": (1, 1, 1514, 15_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run of the guest.

    Attributes:
        rate: Frames a second; round trips for an echo.
        kick_us: What one kick takes the guest.
        kicks: For each frame.
    """

    rate: float
    kick_us: float
    kicks: float


def build_guest(folder: Path) -> Path:
    """Compile the guest.

    Raises:
        MeasureError: The compiler does not.
    """
    program, part = folder / "net.elf", folder / "net.o"
    flags = ["-m32", "-O2", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-mno-sse", "-Wall", "-Wextra"]
    flags += ["-fno-asynchronous-unwind-tables", "-c", str(GUEST / "net.c"), "-o", str(part)]
    link = ["-m", "elf_i386", "--no-warn-rwx-segments", "-T", str(GUEST / "ring3.ld"), "-o", str(program), str(part)]
    for command in (["gcc", *flags], ["ld", *link]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MeasureError(f"cannot build the guest: {done.stderr}")
    return program


def kvmlite_command(guest: Path, cmdline: str) -> list[str]:
    """kvmlite, the guest as it is."""
    machine = str(PROJECT / "scripts/benchkit/net_machine.py")
    return [sys.executable, machine, str(guest), "", cmdline, "1", INTERFACE, "off"]


def qemu_command(guest: Path, cmdline: str) -> list[str]:
    """QEMU's microvm with as little as it can have."""
    return [
        "qemu-system-x86_64", "-M", MACHINE, "-enable-kvm", "-cpu", QEMU_BARE_CPU, "-m", "64M", "-nodefaults",
        "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", str(guest), "-append",
        cmdline, "-global", "virtio-mmio.force-legacy=false",
        "-netdev", f"tap,id=n0,ifname={INTERFACE},script=no,downscript=no,vhost=off",
        "-device", f"virtio-net-device,netdev=n0,mac={MAC}",
    ]  # fmt: skip


def echo(size: int, count: int) -> None:
    """Send frames one by one, each after the answer to the one before.

    Raises:
        MeasureError: One did not come back.
    """
    frame = b"\xff" * 6 + b"\x02\0\0\0\0\x02" + struct.pack(">H", ETHERTYPE) + bytes(size - 14)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)) as wire:
        wire.bind((INTERFACE, ETHERTYPE))
        wire.settimeout(5)
        for _ in range(count):
            wire.send(frame)
            try:
                wire.recv(size)
            except TimeoutError:
                raise MeasureError("a frame did not come back") from None


def run_guest(command: Sequence[str], cell: str) -> Figures:
    """Run it until the guest has printed its figures, then kill it.

    Raises:
        MeasureError: It ended, or did not print them in time.
    """
    mode, _, size, count = CELLS[cell]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        lines = Lines(process, LIMIT_S)
        _, begin = lines.wait_for(b"go\n")
        if mode:
            begin = time.monotonic()
            echo(size, count)
        lines.wait_for(b"bench ")
        elapsed = time.monotonic() - begin
        figures, _ = lines.wait_for(b"end\n")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    frames, total, kicks, kick_ticks = (int(word, 16) for word in figures.split())
    tick_us = elapsed * 1e6 / total
    return Figures(rate=frames / elapsed, kick_us=kick_ticks * tick_us / max(kicks, 1), kicks=kicks / frames)


def bench_queue_net(runs: int) -> int:
    """Measure and print; the exit status."""
    kept = True
    with tempfile.TemporaryDirectory(prefix="kvmlite-bench-") as name, tap(INTERFACE, "10.88.0.1"):
        guest = build_guest(Path(name))
        print(f"virtio-net without a kernel over a TAP, {runs} runs each, alternating; medians")
        print(f"{'':<18}{'kvmlite /s':>12}{'QEMU /s':>12}{'ratio':>7}   kick us and kicks per frame, of both")
        for cell, (mode, depth, size, count) in CELLS.items():
            cmdline = f"{mode} {depth} {size} {count}"
            commands = kvmlite_command(guest, cmdline), qemu_command(guest, cmdline)
            pairs = [[run_guest(command, cell) for command in commands] for _ in range(runs)]
            ours, theirs = (
                Figures(**{f: statistics.median(getattr(p[side], f) for p in pairs) for f in Figures.__slots__})
                for side in (0, 1)
            )
            ratio = ours.rate / theirs.rate
            kept = kept and ratio >= RATIO_PROMISE
            kicks = f"{ours.kick_us:>6.1f}{ours.kicks:>6.2f} {theirs.kick_us:>6.1f}{theirs.kicks:>6.2f}"
            print(f"{cell:<18}{ours.rate:>12.0f}{theirs.rate:>12.0f}{ratio:>7.2f}   {kicks}", flush=True)
    print(f"promise (ratio >= {RATIO_PROMISE} in every cell): {'kept' if kept else 'BROKEN'}")
    return 0 if kept else 1
