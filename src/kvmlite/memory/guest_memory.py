"""Guest RAM: how it is backed, and the one checked door to it.

RAM fills guest-physical addresses from 0 up to the 32-bit hole at 3 GiB and goes on at 4 GiB. Each region has a
no-access guard page on both sides and starts at a 2 MiB boundary of the host, so that it can use huge pages.
"""

from __future__ import annotations

import os

from kvmlite._native import ffi, lib
from kvmlite.errors import ConfigError, HostError, KvmliteError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

HOLE_START = 0xC0000000
HOLE_END = 0x100000000
PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 << 20

BACKINGS = ("anonymous", "memfd", "hugepages")


class GuestMemoryError(KvmliteError):
    """A guest-physical range that is not wholly inside one region of RAM.

    Attributes:
        gpa: Start of the range.
        size: Bytes.
    """

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(f"guest-physical range {gpa:#x} (size {size:#x}) is not inside one region of RAM")
        self.gpa = gpa
        self.size = size


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRegion:
    """A contiguous range of guest RAM, mapped at ``hva`` of this process.

    Attributes:
        gpa, size: Bytes; multiples of 4096.
        hva: Host virtual address, 2 MiB aligned.
        fd: Its memfd, owned by the GuestMemory; -1 if anonymous.
        fd_offset: Where in the memfd the region starts.
    """

    gpa: int
    size: int
    hva: int
    fd: int = -1
    fd_offset: int = 0


def split_at_hole(size: int) -> list[tuple[int, int]]:
    """``[(gpa, size)]`` for so many bytes of RAM, around the 32-bit hole."""
    if size <= HOLE_START:
        return [(0, size)]
    return [(0, HOLE_START), (HOLE_END, size - HOLE_START)]


class GuestMemory:
    """The RAM of one machine.

    Args:
        size: Bytes in all, a multiple of 4096 (2 MiB for ``hugepages``).
        backing: ``anonymous`` (fastest faults), ``memfd`` (can be shared with another process), ``hugepages``
            (a memfd of 2 MiB pages from the host's pool).
        layout: ``[(gpa, size)]`` to use instead of the standard map; for tests.

    Thread: any; reads and writes race with the guest as on real hardware. After ``close`` every access raises.
    """

    def __init__(
        self, size: int, *, backing: str = "anonymous", layout: Iterable[tuple[int, int]] | None = None
    ) -> None:
        if backing not in BACKINGS:
            raise ConfigError(f"unknown memory backing {backing!r}; choose one of {', '.join(BACKINGS)}")
        granule = HUGE_PAGE_SIZE if backing == "hugepages" else PAGE_SIZE
        if size <= 0 or size % granule:
            raise ConfigError(f"guest memory of {size} bytes is not a positive multiple of {granule}")
        self.size = size
        self.backing = backing
        self.native = ffi.new("struct kvl_mem *")
        self.regions: tuple[MemoryRegion, ...] = ()
        self._fd = -1
        try:
            self._map(list(layout) if layout is not None else split_at_hole(size))
        except BaseException:
            self.close()
            raise

    def _map(self, layout: list[tuple[int, int]]) -> None:
        if len(layout) > lib.KVL_MEM_MAX_REGIONS:
            raise ConfigError(f"{len(layout)} regions of guest memory; at most {lib.KVL_MEM_MAX_REGIONS} fit")
        if self.backing != "anonymous":
            self._fd = self._open_memfd(sum(size for _, size in layout))
        regions: list[MemoryRegion] = []
        offset = 0
        for gpa, size in layout:
            regions.append(self._map_region(gpa, size, offset))
            self.regions = tuple(regions)
            offset += size
        for native, region in zip(self.native.regions, regions, strict=False):
            native.gpa, native.size = region.gpa, region.size
            native.hva = ffi.cast("uint8_t *", region.hva)
        self.native.count = len(regions)

    def _open_memfd(self, size: int) -> int:
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if self.backing == "hugepages" else 0)
        fd = -1
        try:
            fd = os.memfd_create("kvmlite-ram", flags)
            os.ftruncate(fd, size)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            number = error.errno or 0
            message = f"cannot make a memfd of {size >> 20} MiB ({self.backing}): {os.strerror(number)}"
            raise HostError(message, number, hint="use anonymous memory") from error
        return fd

    def _map_region(self, gpa: int, size: int, offset: int) -> MemoryRegion:
        hva = lib.kvl_mem_map(size, self._fd, offset if self._fd >= 0 else 0, self._fd >= 0)
        if hva == ffi.NULL:
            number = ffi.errno
            hint = (
                "use less memory"
                if self.backing != "hugepages"
                else (
                    f"the host's pool of 2 MiB pages is too small: sudo sysctl vm.nr_hugepages={self.size // HUGE_PAGE_SIZE}"
                )
            )
            raise HostError(f"cannot map {size >> 20} MiB of guest memory: {os.strerror(number)}", number, hint=hint)
        address = int(ffi.cast("uintptr_t", hva))
        return MemoryRegion(gpa=gpa, size=size, hva=address, fd=self._fd, fd_offset=offset if self._fd >= 0 else 0)

    def advise_huge_pages(self) -> None:
        """Let the host back RAM with transparent huge pages where it has them: fewer and larger faults.

        For guests that will use much of their RAM; one that touches a few pages would only be given more.
        """
        for region in self.regions:
            lib.kvl_mem_advise_huge(ffi.cast("uint8_t *", region.hva), region.size)

    def discard(self, gpa: int, size: int) -> int:
        """Give the whole host pages inside a range back to the host; the guest reads zeros there from now on.

        A host page is 4 KiB, with ``hugepages`` 2 MiB: what does not fill one stays as it is.

        Returns:
            Bytes given back.

        Raises:
            GuestMemoryError: The range is not wholly inside one region.
            HostError: The host refuses, as for memory that is locked.
        """
        self._at(gpa, size)
        region = next(region for region in self.regions if region.gpa <= gpa < region.gpa + region.size)
        granule = HUGE_PAGE_SIZE if self.backing == "hugepages" else PAGE_SIZE
        start = (gpa - region.gpa + granule - 1) // granule * granule
        whole = (gpa - region.gpa + size) // granule * granule - start
        if whole <= 0:
            return 0
        hva = ffi.cast("uint8_t *", region.hva + start)
        if lib.kvl_mem_discard(hva, whole, region.fd, region.fd_offset + start):
            number = ffi.errno
            message = f"cannot give {whole} bytes of guest memory back to the host: {os.strerror(number)}"
            raise HostError(message, number)
        return whole

    def to_hva(self, gpa: int, size: int) -> int:
        """Where a range of guest RAM is in this process's memory, for a kernel that works on it.

        Raises:
            GuestMemoryError: The range is not wholly inside one region.
        """
        return int(ffi.cast("uintptr_t", self._pointer(gpa, size)))

    def to_gpa(self, hva: int) -> int:
        """The guest-physical address of a byte of RAM, given where this process has it.

        Raises:
            ValueError: No region is mapped there (a bug in the device, not in the guest).
        """
        for region in self.regions:
            if 0 <= hva - region.hva < region.size:
                return region.gpa + hva - region.hva
        raise ValueError(f"host address {hva:#x} is not in guest memory")

    def close(self) -> None:
        """Unmap everything. No vCPU or device may use it any more."""
        self.native.count = 0
        for region in self.regions:
            lib.kvl_mem_unmap(ffi.cast("uint8_t *", region.hva), region.size)
        self.regions = ()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, gpa: int, size: int) -> bytes:
        """Copy out of guest RAM.

        Raises:
            GuestMemoryError: The range is not wholly inside one region.
        """
        return bytes(self._at(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy into guest RAM.

        Raises:
            GuestMemoryError: The range is not wholly inside one region.
        """
        self._at(gpa, len(data))[:] = data

    def read_file(self, gpa: int, fd: int, offset: int, size: int) -> None:
        """Read ``size`` bytes at ``offset`` of a file straight into guest RAM.

        Raises:
            GuestMemoryError: The range is not wholly inside one region.
            EOFError: The file ends before.
            OSError: Reading failed.
        """
        view = self._at(gpa, size)
        done = 0
        while done < size:
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise EOFError(f"file ends {size - done} bytes early")
            done += count

    def _at(self, gpa: int, size: int) -> Any:
        return memoryview(ffi.buffer(self._pointer(gpa, size), size))

    def _pointer(self, gpa: int, size: int) -> Any:
        if gpa < 0 or size < 0 or gpa >= 1 << 64 or size >= 1 << 64:
            raise GuestMemoryError(gpa, size)
        pointer = lib.kvl_mem_at(self.native, gpa, size)
        if pointer == ffi.NULL:
            raise GuestMemoryError(gpa, size)
        return pointer
