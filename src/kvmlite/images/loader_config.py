"""What a boot loader's configuration says would be booted: GRUB's grub.cfg, extlinux.conf, entries of the Boot Loader Specification.

Only plain statements are understood, as distributions' tools write them: no variables, no conditions. Paths are those of
the file system that the loader reads.
"""

from __future__ import annotations

from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LoaderEntry", "choose_newest", "parse_bls", "parse_extlinux", "parse_grub"]

# Ours to say, or of no use here: where the root is, who is init, where the console is, how to end.
_DROPPED = frozenset(
    (
        "BOOT_IMAGE", "console", "earlycon", "earlyprintk", "init", "initrd", "panic", "quiet", "rdinit", "reboot", "resume",
        "ro", "root", "rootflags", "rootfstype", "rootwait", "rw", "splash", "vt.handoff",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderEntry:
    """One thing to boot.

    Attributes:
        kernel: Path of the kernel.
        arguments: Of its command line, without those that are ours to give.
    """

    kernel: str
    arguments: tuple[str, ...]


def parse_bls(text: str) -> LoaderEntry | None:
    """Read an entry of the Boot Loader Specification: ``key value`` lines; None if it names no kernel."""
    kernel, options = "", []
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if key == "linux":
            kernel = value.strip()
        elif key == "options":
            options += value.split()
    return _entry(kernel, options)


def parse_extlinux(text: str) -> LoaderEntry | None:
    """Read extlinux.conf or syslinux.cfg: the entry that DEFAULT names, else the first; None if there is none."""
    default, label = "", ""
    kernels: dict[str, str] = {}
    options: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        key, value = key.lower(), value.strip()
        if key == "default":
            default = value
        elif key == "label":
            label = value
        elif key in ("kernel", "linux") and label:
            kernels.setdefault(label, value)
        elif key == "append" and label:
            options.setdefault(label, value.split())
    chosen = default if default in kernels else next(iter(kernels), "")
    return _entry(kernels.get(chosen, ""), options.get(chosen, []))


def parse_grub(text: str) -> LoaderEntry | None:
    """Read grub.cfg: the entry that ``set default=NUMBER`` names, else the first; of a submenu its first. None if there is none."""
    default, index, depth = 0, -1, 0
    entries: dict[int, LoaderEntry] = {}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] in ("menuentry", "submenu") and depth == 0:
            index += 1
        if words[0] == "set" and len(words) > 1 and words[1].startswith("default="):
            value = words[1].partition("=")[2].strip("\"'")
            default = int(value) if value.isdecimal() and len(value) < 5 else default
        if words[0] in ("linux", "linuxefi", "linux16") and len(words) > 1 and index >= 0:
            found = _entry(words[1], words[2:])
            if found is not None:
                entries.setdefault(index, found)
        depth += line.rstrip().endswith("{")
        depth -= words[0] == "}"
    return entries.get(default) or (entries[min(entries)] if entries else None)


def choose_newest(names: Mapping[str, LoaderEntry]) -> LoaderEntry | None:
    """Return the entry whose name has the highest version; rescue kernels only if there is nothing else."""
    ordered = sorted(names, key=lambda name: ("rescue" not in name, version_key(name)))
    return names[ordered[-1]] if ordered else None


def version_key(text: str) -> list[tuple[int, int, str]]:
    """Return what versions are compared by: numbers as numbers, the rest as text."""
    parts: list[str] = []
    for character in text:
        if parts and parts[-1][0].isdecimal() == character.isdecimal():
            parts[-1] += character
        else:
            parts.append(character)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _entry(kernel: str, arguments: list[str]) -> LoaderEntry | None:
    if kernel.startswith("("):  # a device in front of it: ($root)/boot/vmlinuz
        kernel = kernel.partition(")")[2]
    if not kernel or "$" in kernel:
        return None
    kept = [word for word in arguments if word.partition("=")[0] not in _DROPPED and "$" not in word]
    return LoaderEntry(kernel=kernel if kernel.startswith("/") else f"/{kernel}", arguments=tuple(kept))
