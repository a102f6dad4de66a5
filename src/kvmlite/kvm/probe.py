"""Is ``/dev/kvm`` backed by a processor with VT-x or AMD-V, or by software? Told apart by timing ring-0 guest code.

A *software KVM* accepts every ioctl and lists the usual capabilities, but emulates guest ring-0 code instruction by
instruction. No flag says so; its speed does. A tiny guest counts down in a loop, and KVM_RUN is timed.

The answer is kept per boot, because creating a VM can take 30-50 ms on some hosts (see docs/kvm-support.md)::

    kvmlite-host 1
    <boot id> <kernel release> <st_dev>:<st_ino>:<st_ctime_ns of /dev/kvm>
    ring0_speed <instructions per second>
"""

from __future__ import annotations

import mmap
import os
import time

from kvmlite._native import ffi
from kvmlite.abi.kvm import KVM_EXIT_HLT, KVM_EXIT_INTR, exit_reason_name
from kvmlite.abi.x86 import RFLAGS_RESERVED
from kvmlite.errors import KvmError, UnsupportedError
from kvmlite.kvm.x86 import enter_protected32
from kvmlite.paths import cache_home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.kvm.system import Kvm
    from kvmlite.kvm.vcpu import Vcpu

SOFTWARE_SPEED_LIMIT = 10_000_000
"""Ring-0 instructions per second below which KVM is software.

The known software KVM reaches 0.5 to 2 million, AMD-V of a host that QEMU's TCG emulates 300 million, processors thousands
of millions: the limit is far from each of them.
"""

BOOT_INSTRUCTIONS = 1_000_000_000
"""Ring-0 instructions of one boot of a stock kernel, the order of magnitude.

A boot takes 9-15 s on an emulated host, which runs kernel code, unlike a tight loop, at about 100 million a second.
"""

_LOOP = b"\x49\x75\xfd\xf4"  # 1: dec ecx; jnz 1b; hlt
_LOOP_INSTRUCTIONS = 2
_FIRST_COUNT = 250
_GROWTH = 4
_MIN_ELAPSED_NS = 500_000
_REPEATS = 3
_PAGE_SIZE = 4096

_CACHE_NAME = "host"
_CACHE_HEADER = "kvmlite-host 1"
_CACHE_MAX_SIZE = 4096


def ring0_speed(kvm: Kvm) -> float:
    """Measure how fast guest ring-0 code runs.

    Returns:
        Instructions per second of a loop of two instructions, the best of three runs.

    Raises:
        UnsupportedError: KVM cannot run it at all.
        HostError: KVM refused to make the VM.

    Thread: any. Blocks: 4 ms of KVM_RUN, or as long as 500 instructions take three times, and KVM_CREATE_VM.
    """
    page = mmap.mmap(-1, _PAGE_SIZE)
    try:
        page[: len(_LOOP)] = _LOOP
        view = ffi.from_buffer(page, require_writable=True)
        try:
            return _speed_in_vm(kvm, int(ffi.cast("uintptr_t", view)))
        finally:
            ffi.release(view)
    finally:
        page.close()


def _speed_in_vm(kvm: Kvm, hva: int) -> float:
    vm = kvm.create_vm()
    try:
        vm.set_memory_slot(0, 0, _PAGE_SIZE, hva)
        vcpu = vm.create_vcpu(0, ffi.new("struct kvl_bus *"))
        try:
            # Flat segments come from KVM_SET_SREGS; the guest loads none, so the table is never read.
            enter_protected32(vcpu, gdt=0, gdt_size=8)
            return _measure(vcpu)
        finally:
            vcpu.close()
    finally:
        vm.close()


def _measure(vcpu: Vcpu) -> float:
    """Lengthen the loop until its time can be told from that of entering and leaving the guest.

    The best of several runs counts: losing the CPU in one of them makes no hardware look like software.
    """
    entry_ns = min(_time_loop(vcpu, 1) for _ in range(_REPEATS))
    count = _FIRST_COUNT
    while True:
        elapsed_ns = _time_loop(vcpu, count) - entry_ns
        for _ in range(1, _REPEATS):
            if elapsed_ns < _MIN_ELAPSED_NS:
                break
            elapsed_ns = min(elapsed_ns, _time_loop(vcpu, count) - entry_ns)
        if elapsed_ns >= _MIN_ELAPSED_NS:
            return count * _LOOP_INSTRUCTIONS * 1e9 / elapsed_ns
        count *= _GROWTH


def _time_loop(vcpu: Vcpu, count: int) -> int:
    """Nanoseconds from entering the guest to its HLT, which KVM without interrupt chips hands to user space."""
    vcpu.set_regs({"rip": 0, "rcx": count, "rflags": RFLAGS_RESERVED})
    started = time.perf_counter_ns()
    leave = vcpu.run()
    while leave.reason == KVM_EXIT_INTR:
        leave = vcpu.run()
    elapsed = time.perf_counter_ns() - started
    if leave.error:
        raise KvmError("KVM_RUN of a ring-0 loop", leave.error)
    if leave.reason != KVM_EXIT_HLT:
        raise UnsupportedError(
            f"KVM cannot run ring-0 code: {exit_reason_name(leave.reason)}, {leave.address:#x}",
            hint="run kvmlite doctor",
        )
    return elapsed


def cached_ring0_speed(kvm: Kvm) -> float:
    """Return what ``ring0_speed`` measured since the host booted and ``/dev/kvm`` appeared; measure if nobody has."""
    key = _cache_key(kvm)
    speed = _read_cache(key)
    return refresh_ring0_speed(kvm) if speed is None else speed


def refresh_ring0_speed(kvm: Kvm) -> float:
    """Measure ``ring0_speed`` and keep it for ``cached_ring0_speed``, if the cache can be written."""
    speed = ring0_speed(kvm)
    _write_cache(_cache_key(kvm), speed)
    return speed


def is_software_kvm(kvm: Kvm) -> bool:
    """Whether guest ring-0 code is emulated, so that stock kernels cannot boot."""
    return cached_ring0_speed(kvm) < SOFTWARE_SPEED_LIMIT


def refuse_software_kvm(kvm: Kvm) -> None:
    """Raise before a stock kernel is started where it cannot boot.

    Raises:
        UnsupportedError: KVM is software; the hint is the way out.
    """
    speed = cached_ring0_speed(kvm)
    if speed < SOFTWARE_SPEED_LIMIT:
        raise UnsupportedError(software_reason(speed), hint=f"{SOFTWARE_WAY_OUT}; --force tries anyway")


SOFTWARE_WAY_OUT = "use a host or cloud instance type with VT-x, AMD-V or nested virtualisation; developers: scripts/lab boots kernels here"


def software_reason(speed: float) -> str:
    """Say what a software KVM of so many ring-0 instructions per second means."""
    return (
        f"this host's /dev/kvm is a software KVM: it emulates ring-0 code at {speed / 1e6:.1f} million instructions/s, "
        f"so a stock kernel would need about {boot_minutes(speed)} to boot"
    )


def boot_minutes(speed: float) -> str:
    """How long a stock kernel would need to boot at so many ring-0 instructions per second: ``8 minutes``."""
    minutes = max(1, round(BOOT_INSTRUCTIONS / speed / 60))
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


def _cache_path() -> str:
    return os.path.join(cache_home(), _CACHE_NAME)


def _cache_key(kvm: Kvm) -> str:
    """What the measurement holds for: this boot, this kernel, this loading of the KVM module."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot_id = file.read().strip()
    except OSError:  # /proc may be hidden in a sandbox; then nothing is kept
        return ""
    device = os.fstat(kvm.fd)
    return f"{boot_id} {os.uname().release} {device.st_dev}:{device.st_ino}:{device.st_ctime_ns}"


def _read_cache(key: str) -> float | None:
    """Return the speed kept under ``key``; None if there is no file or it is not one of ours."""
    if not key:
        return None
    try:
        fd = os.open(_cache_path(), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            lines = os.read(fd, _CACHE_MAX_SIZE).decode("ascii").splitlines()
        finally:
            os.close(fd)
    except (OSError, UnicodeDecodeError):  # a cache that cannot be read is an empty one
        return None
    if len(lines) != 3 or lines[0] != _CACHE_HEADER or lines[1] != key:
        return None
    name, _, value = lines[2].partition(" ")
    return float(value) if name == "ring0_speed" and value.isdigit() and int(value) else None


def _write_cache(key: str, speed: float) -> None:
    """Keep the speed; a disk that is full or read-only only costs the next start a measurement."""
    if not key:
        return
    path = _cache_path()
    draft = f"{path}.{os.getpid()}"
    text = f"{_CACHE_HEADER}\n{key}\nring0_speed {max(1, round(speed))}\n"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        try:
            written = os.write(fd, text.encode())
        finally:
            os.close(fd)
        if written == len(text):
            os.replace(draft, path)
            return
    except OSError:
        pass
    _remove(draft)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:  # nothing more can be done about a file that cannot be removed
        pass
