"""``scripts/bench net``: a guest's network beside QEMU's microvm; in the lab.

Both monitors boot the same kernel, initramfs, vCPUs and memory, and stay up beside each other; the measurements alternate.
The guest serves iperf3 and sockperf, the host asks: streams both ways, one and four at a time, and small requests over one
connection. A way in is a TAP served in user space, a TAP served by the host's kernel, or a network without any rights: passt
beside QEMU's own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchkit.boot import QEMU_MACHINES, default_kernel
from benchkit.guest_files import StockGuest
from benchkit.lines import Lines
from benchkit.measure import MeasureError

PROJECT = Path(__file__).resolve().parents[2]
MAC = "52:54:00:12:34:56"
LIMIT_S = 200.0
ATTEMPTS = 3
QEMU_MACHINE = QEMU_MACHINES[1]  # with kernel-irqchip=on, QEMU 7.2's microvm loses the interrupts of virtio-mmio
PROMISES = {"tap": 1.0, "vhost": 0.95, "user": 2.0}
CELLS = {
    "guest-to-host-1": ("-R", "-P1"),
    "host-to-guest-1": ("-P1",),
    "guest-to-host-4": ("-R", "-P4"),
    "host-to-guest-4": ("-P4",),
    "requests": (),
}
PROGRAMS = ("/usr/bin/iperf3", "/usr/bin/sockperf")
IPERF_PORT, SOCKPERF_PORT = 5201, 11111
INIT = """#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
while read -r module; do insmod "$module"; done < /kvmlite/modules
for word in $(cat /proc/cmdline); do case $word in bench.ip=*) ip=${word#*=} ;; bench.gw=*) gw=${word#*=} ;; esac; done
ip link set lo up; ip link set eth0 up; ip addr add "$ip/24" dev eth0
[ -z "$gw" ] || { ip route add default via "$gw"; ping -c 1 -W 1 "$gw" >/dev/null; }  # which also says who we are
iperf3 -s >/dev/null 2>&1 &
sockperf sr --tcp -i 0.0.0.0 -p 11111 >/dev/null 2>&1 &
sleep 1
echo bench-ready
sleep 100000
"""


def _with_libraries(programs: Sequence[str]) -> set[str]:
    paths = set(programs)
    for program in programs:
        if not Path(program).exists():
            raise MeasureError(f"{program} is not installed")
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        paths |= {word for line in listed.splitlines() for word in line.split() if word.startswith("/")}
    return paths


@contextmanager
def tap(name: str, address: str) -> Iterator[None]:
    """A TAP interface with the host's address."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, timeout=30)

    ip("tuntap", "add", name, "mode", "tap", "vnet_hdr")
    try:
        ip("addr", "add", f"{address}/24", "dev", name)
        ip("link", "set", name, "up")
        yield
    finally:
        ip("link", "delete", name)


@contextmanager
def booted(command: Sequence[str]) -> Iterator[None]:
    """A monitor whose guest serves.

    Raises:
        MeasureError: It did not come up.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        Lines(process, LIMIT_S).wait_for(b"bench-ready")
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def kvmlite_command(guest: StockGuest, cmdline: str, cpus: int, network: Sequence[str]) -> list[str]:
    """kvmlite, the guest as it is."""
    machine = str(PROJECT / "scripts/benchkit/net_machine.py")
    return [sys.executable, machine, str(guest.kernel), str(guest.initrd), cmdline, str(cpus), *network]


def qemu_command(guest: StockGuest, cmdline: str, cpus: int, network: str) -> list[str]:
    """QEMU's microvm with as little as it can have."""
    return [
        "qemu-system-x86_64", "-M", QEMU_MACHINE, "-enable-kvm", "-cpu", "host", "-m", "512M", "-smp", str(cpus),
        "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
        "-kernel", str(guest.vmlinux), "-initrd", str(guest.initrd), "-append", cmdline,
        "-global", "virtio-mmio.force-legacy=false", "-netdev", network,
        "-device", f"virtio-net-device,netdev=n0,mac={MAC}",
    ]  # fmt: skip


def measure(cell: str, address: str, ports: tuple[int, int], seconds: float) -> float:
    """Gigabits a second of a stream, or requests a second.

    Raises:
        MeasureError: The tool failed.
    """
    if cell == "requests":
        command = ["sockperf", "pp", "--tcp", "-i", address, "-p", str(ports[1]), "-t", f"{max(1, round(seconds))}"]
    else:
        command = ["iperf3", "-c", address, "-p", str(ports[0]), "-t", f"{seconds:g}", "-J", *CELLS[cell]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + 10 * seconds)
    if cell == "requests":
        found = re.search(r"RunTime=([\d.]+) sec.*?ReceivedMessages=(\d+)", done.stdout)
        if done.returncode == 0 and found:
            return int(found[2]) / float(found[1])
    elif done.returncode == 0:
        summary = json.loads(done.stdout)["end"].get("sum_received")
        if summary:
            return float(summary["bits_per_second"]) / 1e9
    raise MeasureError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-500:]}")


class Sides:
    """kvmlite and QEMU with guests on the same kind of network: where to ask them."""

    def __init__(self, stack: ExitStack, mode: str, guest: StockGuest, cpus: int) -> None:
        cmdline = "console=ttyS0 quiet rdinit=/bench"
        self.addresses = ["127.0.0.1", "127.0.0.1"]
        self.ports = [(IPERF_PORT + 10 * side, SOCKPERF_PORT + 10 * side) for side in (0, 1)]
        if mode == "user":
            cmdline += " bench.ip=10.0.2.15 bench.gw=10.0.2.2"
            publish = [f"127.0.0.1:{ours}:{theirs}" for ours, theirs in self._forwards(0)]
            ours = kvmlite_command(guest, cmdline, cpus, ["user", *publish])
            forwards = ",".join(f"hostfwd=tcp:127.0.0.1:{ours}-:{theirs}" for ours, theirs in self._forwards(1))
            theirs = qemu_command(guest, cmdline, cpus, f"user,id=n0,{forwards}")
        else:
            vhost = "on" if mode == "vhost" else "off"
            names = ["kvlbench0", "kvlbench1"]
            for side, name in enumerate(names):
                stack.enter_context(tap(name, f"10.88.{side}.1"))
            self.addresses = ["10.88.0.2", "10.88.1.2"]
            self.ports = [(IPERF_PORT, SOCKPERF_PORT)] * 2
            ours = kvmlite_command(guest, f"{cmdline} bench.ip=10.88.0.2", cpus, [names[0], vhost])
            options = f"tap,id=n0,ifname={names[1]},script=no,downscript=no,vhost={vhost}"
            theirs = qemu_command(guest, f"{cmdline} bench.ip=10.88.1.2", cpus, options)
        for command in (ours, theirs):
            stack.enter_context(booted(command))

    def _forwards(self, side: int) -> list[tuple[int, int]]:
        return list(zip(self.ports[side], (IPERF_PORT, SOCKPERF_PORT), strict=True))

    def _measure(self, cell: str, side: int, seconds: float) -> float:
        """Once more if it failed: user networks lose a connection now and then, QEMU's and passt's."""
        for _ in range(ATTEMPTS - 1):
            try:
                return measure(cell, self.addresses[side], self.ports[side], seconds)
            except MeasureError as error:
                print(f"  {('kvmlite', 'QEMU')[side]}, {cell}: {str(error)[-200:]}", flush=True)
        return measure(cell, self.addresses[side], self.ports[side], seconds)

    def compare(self, cell: str, runs: int, seconds: float) -> tuple[list[float], list[float]]:
        """Figures of both, taken in turn."""
        figures: tuple[list[float], list[float]] = ([], [])
        for number in range(runs + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                figure = self._measure(cell, side, seconds)
                if number:  # the first is to warm up
                    figures[side].append(figure)
        return figures


def bench_net(
    runs: int, kernel: Path | None, cpus: int, seconds: float, modes: Sequence[str], cells: Sequence[str]
) -> int:
    """Measure and print; the exit status."""
    os.environ["PYTHONPATH"] = str(PROJECT / "src")
    kept = True
    with tempfile.TemporaryDirectory(prefix="kvmlite-bench-") as folder:
        extra = {path: path for path in _with_libraries(PROGRAMS)}
        guest = StockGuest(Path(folder), kernel or default_kernel(), ("mmio", "net"), INIT, extra)
        print(f"iperf3 and sockperf, {guest.kernel.name}, {cpus} vCPU; {runs} runs of {seconds:g} s each, alternating")
        for mode in modes:
            print(
                f"{mode + ', median':<24}{'kvmlite':>10}{'QEMU':>10}{'ratio':>8}{'min':>8}{'max':>8}  Gbit/s, requests/s"
            )
            with ExitStack() as stack:
                sides = Sides(stack, mode, guest, cpus)
                for cell in cells:
                    ours, theirs = sides.compare(cell, runs, seconds)
                    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
                    ratio = statistics.median(ours) / statistics.median(theirs)
                    kept = kept and ratio >= PROMISES[mode]
                    figures = f"{statistics.median(ours):>10.3f}{statistics.median(theirs):>10.3f}{ratio:>8.2f}"
                    print(f"{cell:<24}{figures}{min(ratios):>8.2f}{max(ratios):>8.2f}", flush=True)
    promises = ", ".join(f"{mode} {PROMISES[mode]}" for mode in modes)
    print(f"promise (ratio at least: {promises}): {'kept' if kept else 'BROKEN'}")
    return 0 if kept else 1
