"""The TSC's frequency, which the lab's kernel cannot find out by itself.

Under emulation the guest reads this machine's own counter. The machine type has neither HPET nor
PM timer, and a PIT emulated on a busy machine is too coarse to calibrate against: the kernel then
hangs, about once in three starts. So it is measured here and told to the kernel.
"""

import ctypes
import mmap
import time
from collections.abc import Callable
from pathlib import Path

from labkit.paths import CACHE

#: rdtsc; shl rdx,32; or rax,rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")


def frequency_khz() -> int:
    """Return the frequency in kHz; measured once in 0.2 s, then the same until the next boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = CACHE / f"tsc-{boot}"
    if known.exists():
        return int(known.read_text())
    khz = _measure()
    for old in CACHE.glob("tsc-*"):
        old.unlink(missing_ok=True)
    known.write_text(str(khz))
    return khz


def _measure() -> int:
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_READ_TSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    read: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    first, begin = read(), time.monotonic_ns()
    time.sleep(0.2)
    last, end = read(), time.monotonic_ns()
    return (last - first) * 1_000_000 // (end - begin)
