"""Program: machines with disks, networks and shared directories, one after the other; what is left of them, as JSON.

    unshare --net python loaded_machines.py KERNEL DIRECTORY COUNT

Every other machine of each network is another process's, killed while it runs. KERNEL is a guest that ends by itself, or the
package of a Linux kernel. DIRECTORY has two images, and KVMLITE_HOME and TMPDIR lie below it. Runs in a network namespace
of its own, as root.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmlite import Disk, Exited, GuestConfig, Kernel, LinuxGuest, Machine, MachineConfig, Network
from kvmlite.host.network.sweep import sweep
from kvmlite.sandbox.mounts import Mount
from support.leaks import children, open_descriptors, threads

if TYPE_CHECKING:
    from kvmlite.sandbox.parts import GuestPart

NETWORKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nat", {"publish": ["8080:80", "0.0.0.0:5353:53/udp"], "allow": ["192.0.2.0/24:80"]}),
    ("user", {"publish": ["8080:80"]}),
    ("bridge=bridge0,vlan=7,address=192.0.2.9/24", {}),
)
LIMIT_S = 60
PR_SET_CHILD_SUBREAPER = 36


def make_bridge() -> None:
    """Make bridge0; not every kernel has bridges."""
    command = ["ip", "link", "add", "bridge0", "type", "bridge", "vlan_filtering", "1"]
    if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0:
        subprocess.run(["ip", "link", "set", "bridge0", "up"], check=True)


def networks() -> tuple[tuple[str, dict[str, Any]], ...]:
    """Those that this host can make."""
    return NETWORKS if "bridge0" in dict(map(reversed, socket.if_nameindex())) else NETWORKS[:-1]


# What a Linux guest does with all that before it ends.
SCRIPT = """
dd if=/dev/urandom of=/dev/vda bs=64k count=4 && dd if=/dev/urandom of=/dev/vdb bs=64k count=4 conv=fsync &&
test -e /a/disk && echo hello > /a/tmp/written && rm /a/tmp/written && touch /b/new && grep -q : /proc/net/dev &&
ip -o addr show eth0 | grep -q inet
"""


def parts_and_disks(directory: Path, number: int) -> tuple[tuple[GuestPart, ...], tuple[Disk, ...]]:
    """Of each sort of disk and directory one, and a network in turn."""
    mode, options = networks()[number % len(networks())]
    parts = (
        Network(mode, **options),
        Mount(source=str(directory), target="/a", mode="rw"),
        Mount(source="/usr", target="/b", mode="overlay"),
    )
    disks = (Disk(path=str(directory / "disk"), overlay="discard"), Disk(path=str(directory / "other"), queues=2))
    return parts, disks


def machine(kernel: str, directory: Path, number: int) -> Machine:
    """A machine whose guest knows of nothing."""
    parts, disks = parts_and_disks(directory, number)
    config = MachineConfig(
        kernel=Kernel(path=kernel),
        memory_mib=16,
        memory_backing="memfd",
        devices=(*disks, *(device for part in parts for device in part.devices)),
    )
    return Machine(config)


def linux_guest(kernel: str, directory: Path, number: int) -> LinuxGuest:
    """A guest that uses all it is given."""
    parts, disks = parts_and_disks(directory, number)
    return LinuxGuest(GuestConfig(kernel=kernel, parts=parts, devices=disks, features=("blk",)))


def run(kernel: str, directory: Path, number: int) -> None:
    """From start to end in this process; every other bare one is stopped from outside."""
    if os.path.isdir(kernel):
        with linux_guest(kernel, directory, number) as guest:
            guest.start()
            guest.wait_agent()
            handle = guest.exec(["sh", "-xc", SCRIPT])
            report = guest.run_to_end(handle)
            assert report.outcome == Exited(code=0), (report.outcome, handle.stderr)
        return
    with machine(kernel, directory, number) as made:
        made.start()
        if number % 2:
            made.stop()
        made.wait(LIMIT_S)


def run_and_kill(kernel: str, directory: Path, number: int) -> None:
    """In another process, killed while it runs."""
    command = [sys.executable, __file__, "hold", kernel, str(directory), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
    reap_orphans()


def reap_orphans() -> None:
    """Wait for the end of processes whose parents have ended before; they are ours now."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
        except ChildProcessError:
            return


def hold(kernel: str, directory: Path, number: int) -> None:
    """Be that process."""
    if os.path.isdir(kernel):
        with linux_guest(kernel, directory, number) as guest:
            guest.start()
            guest.wait_agent()
            print("up", flush=True)
            sys.stdin.read()
        return
    with machine(kernel, directory, number) as made:
        made.build()
        print("up", flush=True)
        sys.stdin.read()


def traces(directory: Path) -> dict[str, list[str]]:
    """Everything a machine could have left on this host, once its daemons have ended."""
    reap_orphans()

    def lines(*command: str) -> list[str]:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    return {
        "interfaces": [line.split()[1] for line in lines("ip", "-o", "link")],
        "rules": lines("nft", "list", "ruleset"),
        "forwarding": [Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()],
        "processes": [Path(f"/proc/{pid}/comm").read_text().strip() for pid in children()],
        "files": sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()),
        "descriptors": sorted(name for _, name in open_descriptors()),
        "threads": sorted(name for _, name in threads()),
        "mounts": lines("findmnt", "-rno", "TARGET"),
    }


def settled_traces(directory: Path, wanted: dict[str, list[str]] | None = None) -> dict[str, list[str]]:
    """Traces once no thread but this one is left, and they are as ``wanted``; after LIMIT_S, as they are.

    A thread that has been joined still needs a moment to leave /proc.
    """
    deadline = time.monotonic() + LIMIT_S
    while True:
        found = traces(directory)
        if (len(found["threads"]) == 1 and wanted in (None, found)) or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def main() -> None:
    """Some bare machines for what is made once and kept, then COUNT of them."""
    if sys.argv[1] == "hold":
        hold(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    kernel, directory, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    make_bridge()
    if not os.path.isdir(kernel):
        for number in range(len(networks())):
            run(kernel, directory, number)
    before = settled_traces(directory)
    for number in range(count):
        is_killed = number // len(networks()) % 2
        (run_and_kill if is_killed else run)(kernel, directory, number)
    sweep()
    is_bare = not os.path.isdir(kernel)  # what a Linux guest needs is imported and opened by the first
    json.dump([before, settled_traces(directory, before if is_bare else None)], sys.stdout)


if __name__ == "__main__":
    main()
