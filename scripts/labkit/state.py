"""Saved machines: the lab is booted once, and resumed for each run.

Booting costs four seconds of emulation, resuming one. What is saved has loaded its modules and
waits for a session; nothing of a run is in it (see ``init/lab.h``). Which machine it is, is all
in its command line: the name of the file is a digest of that.
"""

import hashlib
import os
import shutil
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from labkit import kernel, qemu, tsc
from labkit.paths import CACHE, LabError, locked
from labkit.session import Control, LostLab, Ports

DEFAULT_CPUS = 2
DEFAULT_MEMORY = "4G"
#: Each is some 170 MB; one per kernel, CPU count and memory size that has been asked for.
_KEPT = 4
_SAVE_WITHIN_S = 90.0


def machine_spec(own_kernel: kernel.Kernel, cpus: int = DEFAULT_CPUS, memory: str = DEFAULT_MEMORY) -> qemu.MachineSpec:
    """Return the machine that runs this kernel."""
    image, initramfs = kernel.boot_files(own_kernel)
    return qemu.MachineSpec(cpus=cpus, memory=memory, kernel=image, initramfs=initramfs, tsc_khz=tsc.frequency_khz())


def saved_state(spec: qemu.MachineSpec, root: Path, console: int) -> Path:
    """Return the saved machine for ``spec``, booting and saving it first if need be.

    Raises:
        LostLab, OutOfTime: It did not come up or could not be saved.
    """
    path = state_path(spec, root)
    if not path.exists():
        with locked("state"):
            if not path.exists():
                _save(spec, root, path, console)
                _drop_old()
    with suppress(FileNotFoundError):  # dropped by another lab: whoever opens it will see
        os.utime(path)
    return path


def state_path(spec: qemu.MachineSpec, root: Path) -> Path:
    """Where the machine is saved, or will be."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise LabError("qemu-system-x86_64 is missing: run scripts/setup lab")
    info = os.stat(program)
    identity = (spec.words(), qemu.SLOTS, qemu.SLOT_SIZE, root.name, info.st_size, info.st_mtime_ns)
    return CACHE / f"state-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def _save(spec: qemu.MachineSpec, root: Path, path: Path, console: int) -> None:
    scratch = path.with_name(f".{path.name}.new")
    with ExitStack() as stack:
        stack.callback(scratch.unlink, missing_ok=True)
        monitor, theirs = socket.socketpair()
        ports = Ports(spec.cpus)
        parts = qemu.Attachments(
            ports=ports.fds(),
            disks={"root": os.fspath(root)},
            monitor=theirs.fileno(),
        )
        machine = qemu.start(spec, parts, console)
        stack.callback(machine.wait)
        stack.callback(machine.kill)
        ports.handed_over()
        theirs.close()
        Control(ports.ours["control"]).read_line(time.monotonic() + _SAVE_WITHIN_S)  # "ready"
        monitor.settimeout(_SAVE_WITHIN_S)
        # the shell starts in the cache directory, so that no path has to be quoted twice over
        command = f'migrate_set_parameter max-bandwidth 64G\nmigrate "exec:cat >{scratch.name}"\ninfo migrate\nquit\n'
        monitor.sendall(command.encode())
        answer = b""
        while data := monitor.recv(65536):
            answer += data
        if b"Migration status: completed" not in answer:
            raise LostLab("its state could not be saved")
        scratch.rename(path)


def _drop_old() -> None:
    used = []
    for path in CACHE.glob("state-*"):
        with suppress(FileNotFoundError):
            used.append((path.stat().st_mtime, path))
    for _, old in sorted(used)[:-_KEPT]:
        old.unlink(missing_ok=True)  # a lab that resumes from it has it open
