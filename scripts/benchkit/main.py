"""Command line of scripts/bench."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark; its exit status."""
    # Light on purpose: memory figures of children cannot fall below ours.
    python = PROJECT / ".venv/bin/python"
    if python.exists() and Path(sys.prefix) != PROJECT / ".venv" and "KVMLITE_BENCH_CHILD" not in os.environ:
        os.environ["KVMLITE_BENCH_CHILD"] = "1"
        os.execv(python, [str(python), str(PROJECT / "scripts/bench"), *arguments])
    source = str(PROJECT / "src")
    sys.path.insert(0, source)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure kvmlite beside a peer.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="exec to a bare guest's first port write to exit")
    start.add_argument("--runs", type=int, default=20)
    boot = commands.add_parser("boot", help="exec to the line init prints; in the lab")
    boot.add_argument("--runs", type=int, default=5)
    boot.add_argument("--kernel", type=Path)
    boot.add_argument("--memory", default="512M")
    boot.add_argument("--cpus", type=int, default=1)
    queue_net = commands.add_parser("queue-net", help="virtio-net alone: a guest without a kernel over a TAP")
    queue_net.add_argument("--runs", type=int, default=5)
    net = commands.add_parser("net", help="iperf3 and sockperf against a guest with a stock kernel; in the lab")
    net.add_argument("--runs", type=int, default=5)
    net.add_argument("--kernel", type=Path)
    net.add_argument("--cpus", type=int, default=1)
    net.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    net.add_argument("--modes", default="tap,vhost,user", help="some of tap, vhost, user")
    net.add_argument("--cells", default="", help="some of the table's lines")
    queue = commands.add_parser("queue", help="virtio-blk alone: a guest without a kernel, a file in memory")
    queue.add_argument("--runs", type=int, default=5)
    block = commands.add_parser("block", help="fio in a guest with a stock kernel; in the lab")
    block.add_argument("--runs", type=int, default=5)
    block.add_argument("--kernel", type=Path)
    block.add_argument("--cpus", type=int, default=1)
    block.add_argument("--seconds", type=float, default=3.0, help="of each job of fio")
    block.add_argument("--image", type=Path, help="measure this instead of a file in memory; it is overwritten")
    block.add_argument("--direct", action="store_true", help="past the host's page cache, both")
    block.add_argument("--disk-words", default="", help="added to kvmlite's --disk, such as ,queues=2")
    given = parser.parse_args(arguments)
    from benchkit.measure import MeasureError

    try:
        if given.command == "start":
            from benchkit.start import bench_start

            return bench_start(given.runs)
        if given.command == "queue-net":
            from benchkit.queue_net import bench_queue_net

            return bench_queue_net(given.runs)
        if given.command == "net":
            from benchkit.net import CELLS, bench_net

            cells = given.cells.split(",") if given.cells else list(CELLS)
            return bench_net(given.runs, given.kernel, given.cpus, given.seconds, given.modes.split(","), cells)
        if given.command == "queue":
            from benchkit.queue import bench_queue

            return bench_queue(given.runs)
        if given.command == "block":
            from benchkit.block import bench_block

            return bench_block(
                given.runs, given.kernel, given.cpus, given.seconds, given.image, given.direct, given.disk_words
            )
        from benchkit.boot import bench_boot

        return bench_boot(given.runs, given.kernel, given.memory, given.cpus)
    except MeasureError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
