"""What a loader hands to the machine, and what it needs of guest memory."""

from __future__ import annotations

from kvmlite.abi import layout
from kvmlite.errors import ConfigError, ImageError
from kvmlite.records import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, Protocol

    class RamRegion(Protocol):
        """One contiguous range of guest RAM."""

        @property
        def gpa(self) -> int: ...
        @property
        def size(self) -> int: ...

    class Ram(Protocol):
        """The part of ``GuestMemory`` that loading needs."""

        @property
        def regions(self) -> Sequence[RamRegion]: ...
        @property
        def size(self) -> int: ...
        def read(self, gpa: int, size: int) -> bytes: ...
        def write(self, gpa: int, data: bytes) -> None: ...
        def read_file(self, gpa: int, fd: int, offset: int, size: int) -> None: ...

    Mode = Literal["long64", "protected32"]

# Flat segments, ring 0: limit 0xfffff pages from 0; access byte 0x9b code / 0x93 data (already accessed), present.
_GDT_LONG64 = bytes(16) + bytes.fromhex("ffff0000009baf00 ffff00000093cf00")
_GDT_PROTECTED32 = bytes(16) + bytes.fromhex("ffff0000009bcf00 ffff00000093cf00")


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryState:
    """State the first vCPU must have at the kernel's first instruction.

    In both modes segments are flat, interrupts are off and the GDT at ``layout.BOOT_GDT`` (32 bytes) holds the
    code segment at selector 0x10 and the data segment at 0x18. ``long64`` has paging on with CR3 = ``page_table``
    (CR0.PE|PG, CR4.PAE, EFER.LME|LMA); ``protected32`` has paging off (CR0.PE only).

    Attributes:
        mode: "long64" or "protected32".
        rip: First instruction, guest-physical (which is also virtual here).
        registers: General registers that are not 0, by lower-case 64-bit name ("rsi", "rbx", "rax", "rsp").
        page_table: GPA of the PML4 in long64, else 0.
    """

    mode: Mode
    rip: int
    registers: dict[str, int] = field(default_factory=dict)
    page_table: int = 0


def write_gdt(memory: Ram, mode: Mode) -> None:
    """Put the GDT that ``EntryState`` promises at ``layout.BOOT_GDT``."""
    memory.write(layout.BOOT_GDT, _GDT_LONG64 if mode == "long64" else _GDT_PROTECTED32)


def read_file(memory: Ram, gpa: int, fd: int, offset: int, size: int, path: str) -> None:
    """Copy a part of a file into guest RAM.

    Raises:
        ImageError: the file has become shorter since it was opened, or cannot be read.
    """
    try:
        memory.read_file(gpa, fd, offset, size)
    except (EOFError, OSError) as error:
        raise ImageError(
            f"{path}: cannot read {size} bytes at byte {offset}: {error}",
            hint="the file changed while it was read, or its disk failed",
        ) from error


def is_ram(memory: Ram, gpa: int, size: int) -> bool:
    """Whether [gpa, gpa + size) lies wholly inside one region of guest RAM."""
    return any(region.gpa <= gpa and gpa + size <= region.gpa + region.size for region in memory.regions)


def require_ram(memory: Ram, gpa: int, size: int, what: str) -> None:
    """Refuse a thing that needs RAM where there is none.

    Raises:
        ConfigError: names the thing, its range and the memory there is.
    """
    if is_ram(memory, gpa, size):
        return
    end = gpa + size
    hint = "the address is no RAM on this machine at any memory size"
    if end <= layout.HOLE_START:
        hint = f"give the machine more: --memory {memory_option(end)}"
    raise ConfigError(
        f"{what} needs RAM at {gpa:#x}-{end:#x}, but the guest has {mebibytes(memory.size)}",
        hint=hint,
    )


def refuse_overlap(what: str, gpa: int, size: int, taken: Sequence[tuple[str, int, int]]) -> None:
    """Refuse a piece of the kernel that lies on something the loader itself puts into memory.

    Args:
        what: The piece, for the message.
        gpa: Its first byte.
        size: Its bytes; 0 overlaps nothing.
        taken: Name, first byte and size of each of the loader's own structures.

    Raises:
        ImageError: names both.
    """
    for name, start, length in taken:
        if gpa < start + length and start < gpa + size and size and length:
            raise ImageError(
                f"{what} at {gpa:#x}-{gpa + size:#x} lies on the {name} at {start:#x}-{start + length:#x}",
                hint="link the kernel at 1 MiB or above",
            )


def mebibytes(size: int) -> str:
    """A size for people: "50.2 MiB", "640 KiB", "12 bytes"."""
    if size < layout.KIB:
        return f"{size} bytes"
    if size < layout.MIB:
        return f"{size / layout.KIB:.4g} KiB"
    return f"{size / layout.MIB:.4g} MiB" if size < 1000 * layout.MIB else f"{size / layout.GIB:.4g} GiB"


def memory_option(size: int) -> str:
    """The smallest round value of ``--memory`` that holds ``size`` bytes: the next power of two, at least 16M."""
    amount = 16
    while amount * layout.MIB < size:
        amount *= 2
    return f"{amount}M" if amount < 1024 else f"{amount // 1024}G"
