"""Which module files a guest needs, in the order in which they must be loaded.

The host decides, so that the guest needs no ``modprobe``: it gets plain ``.ko`` files and a list. Dependencies come from
``modules.dep`` where ``depmod`` has run, else from each module's own ``.modinfo`` (Debian packages ship no
``modules.dep``: it is made when the package is installed, and kvmlite installs nothing).
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, ImageError
from kvmlite.images.module_file import load_module, module_name, parse_modinfo
from kvmlite.records import dataclass

__all__ = [
    "FEATURES",
    "LoadedModule",
    "ModulePlan",
    "ModuleTree",
    "parse_modules_dep",
    "plan_modules",
    "wanted_modules",
]

FEATURES: dict[str, tuple[str, ...]] = {
    "mmio": ("virtio_mmio",),
    "pci": ("virtio_pci",),
    "rng": ("virtio_rng",),
    "vsock": ("vmw_vsock_virtio_transport",),
    "console": ("virtio_console",),
    "blk": ("virtio_blk",),
    "net": ("virtio_net",),
    "packet": ("af_packet",),
    "balloon": ("virtio_balloon",),
    "pmem": ("virtio_pmem", "nd_pmem"),
    "ext4": ("ext4",),
    "overlay": ("overlay",),
    "squashfs": ("squashfs",),
    "erofs": ("erofs",),
    "xfs": ("xfs",),
    "btrfs": ("btrfs",),
    "iso9660": ("isofs",),
    "vfat": ("vfat", "nls_ascii", "nls_iso8859_1", "nls_cp437"),
    "9p": ("9pnet_virtio", "9p"),
    "fs": ("virtiofs",),
    "fuse": ("fuse",),
    "loop": ("loop",),
    "tun": ("tun",),
}
"""What a guest may be asked to do, and the modules that make it so (names as in ``lsmod``), in load order."""

_CONFIG_SYMBOLS = {
    "virtio_mmio": "VIRTIO_MMIO",
    "virtio_pci": "VIRTIO_PCI",
    "virtio_rng": "HW_RANDOM_VIRTIO",
    "vmw_vsock_virtio_transport": "VIRTIO_VSOCKETS",
    "virtio_console": "VIRTIO_CONSOLE",
    "virtio_blk": "VIRTIO_BLK",
    "virtio_net": "VIRTIO_NET",
    "af_packet": "PACKET",
    "virtio_balloon": "VIRTIO_BALLOON",
    "virtio_pmem": "VIRTIO_PMEM",
    "nd_pmem": "BLK_DEV_PMEM",
    "ext4": "EXT4_FS",
    "overlay": "OVERLAY_FS",
    "squashfs": "SQUASHFS",
    "erofs": "EROFS_FS",
    "xfs": "XFS_FS",
    "btrfs": "BTRFS_FS",
    "isofs": "ISO9660_FS",
    "vfat": "VFAT_FS",
    "9pnet_virtio": "NET_9P_VIRTIO",
    "9p": "9P_FS",
    "virtiofs": "VIRTIO_FS",
    "fuse": "FUSE_FS",
    "loop": "BLK_DEV_LOOP",
    "tun": "TUN",
}

_SOFT_ALIASES = {
    "crc32c": ("crc32c_generic", "crc32c_intel"),
    "crypto-crc32c": ("crc32c_generic", "crc32c_intel"),
    "crc32": ("crc32_generic",),
    "sha256": ("sha256_generic",),
    "xxhash64": ("xxhash_generic",),
    "blake2b-256": ("blake2b_generic",),
}
"""Algorithms that soft dependencies ask for by name, and who implements them (the guest's kernel cannot load them itself)."""

_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModule:
    """A module to load: its name as in ``lsmod`` and its file on the host (possibly packed)."""

    name: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """What is to be loaded, and what became of each wanted module.

    Attributes:
        load: Files in load order, dependencies first.
        builtin: Wanted modules that are part of the kernel image.
        missing: Wanted modules that this kernel does not have.
        unknown: Wanted modules of a kernel that comes without modules and config: possibly built in.
    """

    load: tuple[LoadedModule, ...]
    builtin: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


def wanted_modules(features: tuple[str, ...], extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the modules for a set of features, in the order of ``FEATURES``, then the extra ones, each once.

    Raises:
        ConfigError: A feature that ``FEATURES`` does not list.
    """
    for feature in features:
        if feature not in FEATURES:
            import difflib

            close = difflib.get_close_matches(feature, FEATURES, n=1)
            raise ConfigError(
                f"unknown guest feature {feature!r}; allowed are {' '.join(FEATURES)}",
                hint=f"did you mean {close[0]!r}?" if close else "",
            )
    names = [name for feature, modules in FEATURES.items() if feature in features for name in modules]
    return tuple(dict.fromkeys(names + [name.replace("-", "_") for name in extra]))


def plan_modules(modules_dir: str | None, wanted: tuple[str, ...], *, config: str | None = None) -> ModulePlan:
    """Find the files for ``wanted`` and everything they depend on.

    Args:
        modules_dir: ``/lib/modules/<release>`` of this kernel on the host, or None if it has no modules.
        wanted: Module names; ``-`` and ``_`` mean the same.
        config: The kernel's ``.config``: tells what is built in where ``modules.builtin`` does not.

    Raises:
        ImageError: ``modules.dep`` or a module file is damaged.
    """
    tree = ModuleTree(modules_dir) if modules_dir else None
    symbols = _read_config(config) if config else None
    load: dict[str, str] = {}
    builtin, missing, unknown = [], [], []
    for name in dict.fromkeys(name.replace("-", "_") for name in wanted):
        if tree and tree.add_with_dependencies(name, load):
            continue
        if (tree and name in tree.builtin) or (symbols and symbols.get(_CONFIG_SYMBOLS.get(name, "")) == "y"):
            builtin.append(name)
        elif tree or (symbols and name in _CONFIG_SYMBOLS):
            missing.append(name)
        else:
            unknown.append(name)
    files = tuple([LoadedModule(name=name, path=path) for name, path in load.items()])
    return ModulePlan(load=files, builtin=tuple(builtin), missing=tuple(missing), unknown=tuple(unknown))


def _read_config(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(4 << 20).splitlines()
    except OSError as error:
        raise ImageError(f"cannot read kernel config {path}: {error.strerror or error}") from error
    pairs = [line[7:].partition("=") for line in lines if line.startswith("CONFIG_")]
    return {name: value for name, _, value in pairs}


class ModuleTree:
    """The modules of one kernel: names, files and what each one needs.

    Attributes:
        directory: ``/lib/modules/<release>``.
        builtin: Names of the modules that are part of the kernel image (from ``modules.builtin``).
    """

    def __init__(self, directory: str) -> None:
        if not os.path.isdir(directory):
            raise ImageError(f"no modules directory {directory}", hint="give the directory that holds modules.order")
        self.directory = directory
        text = _read_text(directory, "modules.builtin")
        self.builtin = frozenset(module_name(_in_tree(line)) for line in text.splitlines()) - {""}
        text = _read_text(directory, "modules.dep")
        self._listed = parse_modules_dep(os.path.join(directory, "modules.dep"), text) if text.strip() else None
        paths = self._listed if self._listed is not None else self._find_files()
        self._paths = {module_name(path): path for path in paths}
        self._soft: dict[str, list[str]] | None = None
        self._aliases: dict[str, list[str]] | None = None

    def _find_files(self) -> list[str]:
        """List module files where there is no ``modules.dep``: from ``modules.order``, else by looking.

        In a build tree the order file names objects (``.o``, or ``kernel/...`` in old kernels); packages compress the files.
        """
        listed = [line.strip() for line in _read_text(self.directory, "modules.order").splitlines() if line.strip()]
        for variant in (listed, [_in_tree(line) for line in listed]):
            if variant and all(self._is_module(path) for path in variant):
                return variant
        found = []
        for directory, _, files in os.walk(self.directory):
            relative = os.path.relpath(directory, self.directory)
            found += [os.path.normpath(os.path.join(relative, name)) for name in files if module_name(name)]
        return sorted(found)

    def _is_module(self, path: str) -> bool:
        is_inside = not path.startswith("/") and ".." not in path.split("/")
        return bool(module_name(path)) and is_inside and os.path.isfile(os.path.join(self.directory, path))

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def paths(self) -> tuple[str, ...]:
        """Return the files of all loadable modules, relative to the directory."""
        return tuple(self._paths.values())

    def add_with_dependencies(self, name: str, load: dict[str, str]) -> bool:
        """Append ``name`` and what it needs to ``load`` (name to file, in load order); False if there is no such module."""
        if name not in self._paths:
            return False
        self._visit(name, load, ())
        return True

    def _visit(self, name: str, load: dict[str, str], above: tuple[str, ...]) -> None:
        if name in load:
            return
        if name in above or len(above) > _MAX_DEPTH:
            chain = " -> ".join((*above[-4:], name))
            raise ImageError(
                f"modules in {self.directory} depend on each other in a circle: {chain}", hint=_remedy(self.directory)
            )
        needed, soft = self._needs(name)
        for other in soft:
            if other in self._paths and other not in above:
                self._visit(other, load, (*above, name))
        for other in needed:
            if other in self._paths:
                self._visit(other, load, (*above, name))
            elif other not in self.builtin:
                raise ImageError(
                    f"module {name} in {self.directory} needs {other}, which is not there", hint=_remedy(self.directory)
                )
        load[name] = os.path.join(self.directory, self._paths[name])

    def _needs(self, name: str) -> tuple[list[str], list[str]]:
        """Return the modules that ``name`` needs, and those that it would rather have loaded before."""
        path = self._paths[name]
        if self._listed is not None:
            soft = [alias for text in self._soft_lines().get(name, []) for alias in _before(text)]
            return [module_name(other) for other in self._listed[path]], self._resolve_soft(soft)
        absolute = os.path.join(self.directory, path)
        info = parse_modinfo(absolute, load_module(absolute))
        needed = [other.replace("-", "_") for text in info.get("depends", ()) for other in text.split(",") if other]
        return needed, self._resolve_soft([alias for text in info.get("softdep", ()) for alias in _before(text)])

    def _soft_lines(self) -> dict[str, list[str]]:
        """Return the soft dependencies that ``depmod`` collected: module name to texts like ``pre: crc32c``."""
        if self._soft is None:
            self._soft = {}
            for line in _read_text(self.directory, "modules.softdep").splitlines():
                word, _, rest = line.strip().partition(" ")
                name, _, text = rest.partition(" ")
                if word == "softdep":
                    self._soft.setdefault(name.replace("-", "_"), []).append(text)
        return self._soft

    def _resolve_soft(self, aliases: list[str]) -> list[str]:
        found = []
        for alias in aliases:
            name = alias.replace("-", "_")
            found += [name] if name in self._paths else self._alias(alias) or list(_SOFT_ALIASES.get(alias, ()))
        return found

    def _alias(self, alias: str) -> list[str]:
        """Look an exact alias up in ``modules.alias``, which only ``depmod`` writes."""
        if self._aliases is None:
            self._aliases = {}
            for line in _read_text(self.directory, "modules.alias").splitlines():
                words = line.split()
                if len(words) == 3 and words[0] == "alias" and "*" not in words[1]:
                    self._aliases.setdefault(words[1], []).append(words[2].replace("-", "_"))
        return self._aliases.get(alias, [])


def parse_modules_dep(path: str, text: str) -> dict[str, list[str]]:
    """Parse ``modules.dep``: each module file (relative to its directory) with the files it needs.

    Raises:
        ImageError: A line has no colon, a path is no module or leads out of the directory, or a needed file is not listed.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        module, colon, rest = line.partition(":")
        needed = rest.split()
        for entry in (module, *needed):
            is_inside = not entry.startswith("/") and ".." not in entry.split("/") and "\0" not in entry
            if not colon or not is_inside or not module_name(entry):
                raise ImageError(f"{path} line {number} is damaged: {line[:60]!r}", hint=_remedy(os.path.dirname(path)))
        found[module] = needed
    for module, needed in found.items():
        for other in needed:
            if other not in found:
                raise ImageError(
                    f"{path} is damaged: {module} needs {other}, which it does not list",
                    hint=_remedy(os.path.dirname(path)),
                )
    return found


def _in_tree(line: str) -> str:
    """Return the file in a build tree that a line of ``modules.order`` or ``modules.builtin`` there stands for."""
    path = line.strip().removeprefix("kernel/")
    return path[:-2] + ".ko" if path.endswith(".o") else path


def _before(softdep: str) -> list[str]:
    """Return the names after ``pre:`` in a soft dependency (``pre: a b post: c``)."""
    names, is_before = [], False
    for word in softdep.split():
        if word in ("pre:", "post:"):
            is_before = word == "pre:"
        elif is_before:
            names.append(word)
    return names


def _remedy(directory: str) -> str:
    release = os.path.basename(directory)
    return f"run depmod {release}, or add the kernel again (kvmlite kernel add)"


def _read_text(directory: str, name: str) -> str:
    """Read one of depmod's text files; empty if there is none."""
    path = os.path.join(directory, name)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(64 << 20)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}", hint=_remedy(directory)) from error
