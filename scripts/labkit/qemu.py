"""The emulated host: QEMU's command line, and its process.

Machine ``microvm``: no PCI bus to probe, which halves the start. All its disks are always there,
in the same order and of the same size, so that a saved machine fits every run; a slot that a run
does not use is an empty sparse file.
"""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from labkit.paths import CACHE, LabError

#: Disks by serial number. "tree" is an archive, the others are ext4.
SLOTS = ("root", "tree", "venv", *(f"kernel{n}" for n in range(6)), *(f"with{n}" for n in range(4)))
#: Of every disk but the root.
SLOT_SIZE = 64 * 2**30
STREAMS = ("control", "stdin", "stdout", "stderr", "out")
#: Each CPU has a heartbeat of its own (``init/heartbeat.c``). The machine type has places for 24 devices.
CPUS_MAX = 8

#: What the TCG of QEMU 7.2 lacks of an EPYC is turned off; it would say so on every start.
_CPU = (
    "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,"
    "-perfctr-core,-clzero,-xsaveerptr,-ibpb,-nrip-save,"
    # TCG does not intercept a nested guest's XSETBV: KVM would not know its XCR0 and mix up FPU states.
    "-xsave,-xsaveopt,-xsavec,-xsaves,-xgetbv1,-avx,-avx2,-f16c,-fma"
)
#: notests: the crypto self-tests cost 0.7 s. mitigations: they fight a CPU that is not there.
_CMDLINE = "console=ttyS0 panic=-1 reboot=t tsc=reliable cryptomgr.notests mitigations=off random.trust_cpu=on"


def heartbeats(cpus: int) -> list[str]:
    """Names of the ports that interrupt one CPU each."""
    return [f"heartbeat{cpu}" for cpu in range(cpus)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """What makes one machine like another: a saved state fits all that share it."""

    cpus: int
    memory: str
    kernel: Path
    initramfs: Path
    tsc_khz: int
    verbose: bool = False

    def words(self) -> list[str]:
        """Return the part of the command line that does not depend on the run."""
        # lpj: Debian's kernels have HZ=250; without it the second CPU calibrates for 0.1 s
        append = f"{_CMDLINE} tsc_early_khz={self.tsc_khz} lpj={self.tsc_khz * 4}"
        append += "" if self.verbose else " quiet"
        words = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none",
            "-no-reboot", "-name", "kvmlite-lab",
            "-M", "microvm,pit=off,pic=off,rtc=on,ioapic2=on", "-accel", "tcg,thread=multi",
            "-cpu", _CPU, "-smp", str(self.cpus), "-m", self.memory,
            "-kernel", os.fspath(self.kernel), "-initrd", os.fspath(self.initramfs),
            "-append", append,
            "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
            "-device", "virtio-serial-device,id=streams,max_ports=8",
        ]  # fmt: skip
        for name in heartbeats(self.cpus):
            words += ["-device", f"virtio-serial-device,id={name},max_ports=2"]
        return words


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachments:
    """What one run adds: descriptors it hands over, and its disks by slot.

    ``ports`` are connected sockets, by port; ``state`` is a saved machine to resume, ``monitor``
    a socket for QEMU's own commands.
    """

    ports: dict[str, int]
    disks: dict[str, str] = field(default_factory=dict)
    state: int | None = None
    monitor: int | None = None
    inherited: tuple[int, ...] = ()

    def words(self) -> list[str]:
        """Return their part of the command line."""
        words = []
        for name, fd in self.ports.items():
            bus, number = ("streams", STREAMS.index(name) + 1) if name in STREAMS else (name, 1)
            words += ["-chardev", f"socket,id={name},fd={fd}"]
            words += ["-device", f"virtserialport,bus={bus}.0,chardev={name},name={name},nr={number}"]
        for slot in SLOTS:
            path = self.disks.get(slot, os.fspath(_empty_disk())).replace(",", ",,")
            drive = f"if=none,id={slot},file={path},format=raw,snapshot=on,cache=unsafe"
            words += ["-drive", drive]
            words += ["-device", f"virtio-blk-device,drive={slot},serial={slot}"]
        if self.state is not None:
            words += ["-incoming", f"fd:{self.state}"]
        if self.monitor is not None:
            words += ["-chardev", f"socket,id=monitor,fd={self.monitor}", "-mon", "chardev=monitor"]
        return words


def start(spec: MachineSpec, parts: Attachments, console: int) -> subprocess.Popen[bytes]:
    """Start QEMU; the guest's console and QEMU's own messages go to the descriptor ``console``.

    It gets a session of its own, so that a Ctrl-C meant for us does not reach it, and is killed
    by the kernel when this process ends, however it ends.
    """
    fds = [*parts.ports.values(), *parts.inherited]
    fds += [fd for fd in (parts.state, parts.monitor) if fd is not None]
    try:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *spec.words(), *parts.words()],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            pass_fds=fds,
            cwd=CACHE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise LabError(f"{error.filename} is missing: run scripts/setup lab") from error


def _empty_disk() -> Path:
    path = CACHE / "empty-disk"
    if not path.exists():
        scratch = CACHE / f".empty-disk-{os.getpid()}"
        with open(scratch, "wb") as file:
            file.truncate(SLOT_SIZE)
        scratch.rename(path)
    return path
