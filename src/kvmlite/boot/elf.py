"""ELF kernels: judge the headers, then put PT_LOAD segments into guest memory at their physical addresses.

Reads headers and notes only; segments go from the file to guest RAM without passing through Python.
"""

from __future__ import annotations

import os

from kvmlite.abi import elf as abi
from kvmlite.abi.linux_boot import START_KERNEL_MAP
from kvmlite.boot.entry import read_file, refuse_overlap, require_ram
from kvmlite.errors import ImageError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmlite.boot.entry import Ram

_MAX_PROGRAM_HEADERS = 128
_MAX_NOTES_SIZE = 64 << 10
_MAX_PHYSICAL = 1 << 52  # x86-64 has no physical address of more bits
_DAMAGED = "the file is damaged; build or download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One PT_LOAD: ``file_size`` bytes at ``offset`` of the file go to ``paddr``, zeros up to ``memory_size``."""

    offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One ELF note; ``owner`` without its NUL."""

    owner: bytes
    kind: int
    description: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfKernel:
    """A checked ELF executable: every segment lies in the file, none overlap.

    Attributes:
        bits: 32 or 64.
        entry: e_entry.
        segments: PT_LOAD segments that take memory, by physical address.
        notes: All notes of all PT_NOTE segments.
    """

    bits: int
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[Note, ...]

    @property
    def pvh_entry(self) -> int | None:
        """Physical address of the PVH entry (XEN_ELFNOTE_PHYS32_ENTRY), None if there is none."""
        description = self._xen_note(abi.XEN_ELFNOTE_PHYS32_ENTRY)
        if description is None or len(description) < 4:
            return None
        return int.from_bytes(description[:8], "little")

    @property
    def is_linux(self) -> bool:
        """Whether this is a Linux kernel: says so in its notes, or is laid out as one."""
        guest = self._xen_note(abi.XEN_ELFNOTE_GUEST_OS)
        if guest is not None:
            return guest.rstrip(b"\0") == b"linux"
        if any(note.owner == b"Linux" for note in self.notes):
            return self.bits == 64
        first = self.segments[0]
        return self.bits == 64 and first.vaddr - first.paddr == START_KERNEL_MAP and self.has(self.entry)

    @property
    def end(self) -> int:
        """First physical address after the last segment."""
        return max(segment.paddr + segment.memory_size for segment in self.segments)

    def has(self, paddr: int) -> bool:
        """Whether a segment covers this physical address with bytes of the file."""
        return any(0 <= paddr - segment.paddr < segment.file_size for segment in self.segments)

    def _xen_note(self, kind: int) -> bytes | None:
        for note in self.notes:
            if note.kind == kind and note.owner == b"Xen":
                return note.description
        return None


def parse_elf(fd: int, size: int, path: str, head: bytes) -> ElfKernel:
    """Read and check the headers and notes of an ELF kernel.

    Args:
        fd: The file; read with pread, its position is left alone.
        size: Its bytes.
        path: Its name, for messages.
        head: Its first bytes, at least 64 where the file has them.

    Raises:
        ImageError: not an x86 executable, truncated, or with impossible headers.
    """
    _check_identity(head, size, path)
    is_64 = head[abi.EI_CLASS] == abi.ELFCLASS64
    header = abi.EHDR64 if is_64 else abi.EHDR32
    if len(head) < header.size:
        raise ImageError(f"{path}: truncated ELF: {size} bytes, its header has {header.size}", hint=_DAMAGED)
    kind, machine, _, entry, offset, _, _, _, entry_size, count, _, _, _ = header.unpack_from(head)
    _check_kind(kind, machine, is_64, path)
    program_header = abi.PHDR64 if is_64 else abi.PHDR32
    if not count:
        raise ImageError(f"{path}: ELF without program headers: nothing to load")
    if count > _MAX_PROGRAM_HEADERS:
        raise ImageError(f"{path}: ELF with {count} program headers, at most {_MAX_PROGRAM_HEADERS} are read")
    if entry_size != program_header.size:
        raise ImageError(
            f"{path}: ELF program headers of {entry_size} bytes, ELF{64 if is_64 else 32} has {program_header.size}"
        )
    table = _read(fd, head, offset, count * entry_size, size)
    if len(table) < count * entry_size:
        raise ImageError(
            f"{path}: truncated ELF: program headers end at byte {offset + count * entry_size}, the file has {size}",
            hint=_DAMAGED,
        )
    headers = [_fields(values, is_64) for values in program_header.iter_unpack(table)]
    if any(fields[0] == abi.PT_INTERP for fields in headers):
        raise ImageError(f"{path}: is a dynamically linked program, not a kernel")
    segments = _segments(headers, size, path)
    notes = tuple(
        note
        for kind, note_offset, _, _, file_size, _, align in headers
        if kind == abi.PT_NOTE
        for note in _notes(_read(fd, head, note_offset, min(file_size, _MAX_NOTES_SIZE), size), align)
    )
    return ElfKernel(bits=64 if is_64 else 32, entry=entry, segments=segments, notes=notes)


def load_segments(
    memory: Ram,
    fd: int,
    kernel: ElfKernel,
    path: str,
    taken: Sequence[tuple[str, int, int]] = (),
) -> None:
    """Copy all segments to their physical addresses.

    What the file does not fill is zero because fresh guest RAM is, and segments do not overlap: clearing it would only
    make the host find pages for it.

    Args:
        memory: Guest RAM.
        fd: The file the kernel was parsed from.
        kernel: What to load.
        path: Its name, for messages.
        taken: What the loader puts into memory itself (see ``refuse_overlap``).

    Raises:
        ConfigError: the guest has not the RAM for a segment.
        ImageError: a segment lies on something in ``taken``.
    """
    for number, segment in enumerate(kernel.segments):
        refuse_overlap(f"{path}: segment {number}", segment.paddr, segment.memory_size, taken)
        require_ram(memory, segment.paddr, segment.memory_size, f"{path}: segment {number}")
    for segment in kernel.segments:
        if segment.file_size:
            read_file(memory, segment.paddr, fd, segment.offset, segment.file_size, path)


def require_entry(kernel: ElfKernel, entry: int, path: str, name: str) -> None:
    """Refuse an entry point outside the kernel.

    Raises:
        ImageError: no segment has bytes there.
    """
    if not kernel.has(entry):
        raise ImageError(f"{path}: {name} {entry:#x} lies outside its segments", hint=_DAMAGED)


def _check_identity(head: bytes, size: int, path: str) -> None:
    if len(head) < 20:
        raise ImageError(f"{path}: truncated ELF: {size} bytes", hint=_DAMAGED)
    if head[abi.EI_CLASS] not in (abi.ELFCLASS32, abi.ELFCLASS64):
        raise ImageError(f"{path}: ELF of class {head[abi.EI_CLASS]}: neither 32 nor 64 bits", hint=_DAMAGED)
    if head[abi.EI_DATA] == abi.ELFDATA2MSB:
        name = _machine_name(int.from_bytes(head[18:20], "big"))
        raise ImageError(f"{path}: is a big-endian ELF for {name}", hint="kvmlite runs x86-64 kernels")
    if head[abi.EI_DATA] != abi.ELFDATA2LSB:
        raise ImageError(f"{path}: ELF of unknown byte order {head[abi.EI_DATA]}", hint=_DAMAGED)


def _check_kind(kind: int, machine: int, is_64: bool, path: str) -> None:
    if machine != (abi.EM_X86_64 if is_64 else abi.EM_386):
        name = _machine_name(machine)
        if machine == abi.EM_X86_64:
            name = "x86-64 with 32-bit pointers (x32)"
        raise ImageError(f"{path}: is an ELF for {name}", hint="kvmlite runs x86-64 kernels")
    if kind == abi.ET_REL:
        raise ImageError(f"{path}: is an object file or kernel module, not a kernel")
    if kind not in (abi.ET_EXEC, abi.ET_DYN):
        name = "a core dump" if kind == abi.ET_CORE else f"an ELF of type {kind}"
        raise ImageError(f"{path}: is {name}, not an executable")


def _machine_name(machine: int) -> str:
    return abi.MACHINE_NAMES.get(machine, f"machine {machine}")


def _fields(values: tuple[int, ...], is_64: bool) -> tuple[int, int, int, int, int, int, int]:
    """Program header in one order for both classes: type, offset, vaddr, paddr, file size, memory size, align."""
    if is_64:
        kind, _, offset, vaddr, paddr, file_size, memory_size, align = values
    else:
        kind, offset, vaddr, paddr, file_size, memory_size, _, align = values
    return kind, offset, vaddr, paddr, file_size, memory_size, align


def _segments(headers: list[tuple[int, int, int, int, int, int, int]], size: int, path: str) -> tuple[Segment, ...]:
    found = []
    for number, (kind, offset, vaddr, paddr, file_size, memory_size, _) in enumerate(headers):
        if kind != abi.PT_LOAD or not memory_size:
            continue
        if file_size > memory_size:
            raise ImageError(
                f"{path}: program header {number}: {file_size:#x} bytes of file for {memory_size:#x} of memory",
                hint=_DAMAGED,
            )
        if file_size and offset + file_size > size:
            raise ImageError(
                f"{path}: truncated ELF: segment {number} ends at byte {offset + file_size}, the file has {size}",
                hint=_DAMAGED,
            )
        if paddr + memory_size > _MAX_PHYSICAL:
            raise ImageError(
                f"{path}: segment {number} at {paddr:#x} with {memory_size:#x} bytes is beyond physical memory"
            )
        found.append(
            Segment(
                offset=offset,
                vaddr=vaddr,
                paddr=paddr,
                file_size=file_size,
                memory_size=memory_size,
            )
        )
    if not any(segment.file_size for segment in found):
        raise ImageError(f"{path}: ELF with nothing to load (no PT_LOAD segment with bytes)")
    found.sort(key=lambda segment: segment.paddr)
    end = 0
    for segment in found:
        if segment.paddr < end:
            raise ImageError(
                f"{path}: segments overlap at {segment.paddr:#x}: the one before ends at {end:#x}",
                hint=_DAMAGED,
            )
        end = segment.paddr + segment.memory_size
    return tuple(found)


def _read(fd: int, head: bytes, offset: int, length: int, size: int) -> bytes:
    """Bytes of the file, short where it ends; without a system call if ``head`` has them."""
    if offset + length <= len(head):
        return head[offset : offset + length]
    if offset >= size:  # also offsets that pread would refuse
        return b""
    return os.pread(fd, min(length, size - offset), offset)


def _notes(data: bytes, align: int) -> Iterator[Note]:
    """Notes up to the first that does not fit: what follows is padding, or alignment of another kind."""
    align = 8 if align == 8 else 4
    at = 0
    while at + abi.NHDR.size <= len(data):
        name_size, description_size, kind = abi.NHDR.unpack_from(data, at)
        start = at + (abi.NHDR.size + name_size + align - 1) // align * align
        if start + description_size > len(data):
            return
        name = data[at + abi.NHDR.size : at + abi.NHDR.size + name_size]
        yield Note(owner=name.rstrip(b"\0"), kind=kind, description=data[start : start + description_size])
        at = start + (description_size + align - 1) // align * align
