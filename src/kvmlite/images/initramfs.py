"""The guest's first root file system: the agent as ``/init``, busybox, and the kernel modules it loads.

It comes in two parts, which the kernel unpacks one over the other: a *base* that many runs share (cached, so that it is
built once per kernel and feature set), and an *overlay* of a few hundred bytes with what is different each time.

What the agent finds::

    /init                       the agent, PID 1
    /kvmlite/agent.conf         key=value lines (from the overlay)
    /kvmlite/modules            module files in load order, one absolute path per line
    /kvmlite/modules.d/NAME.ko  the files, unpacked
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, ImageError
from kvmlite.images.cpio import CpioTree
from kvmlite.images.module_file import load_module
from kvmlite.images.modules import ModulePlan, plan_modules, wanted_modules
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmlite.images.kernel_file import Kernel

__all__ = ["Initramfs", "build_base", "build_overlay", "file_signature"]

_DIRECTORIES = {
    "/dev": 0o755, "/etc": 0o755, "/kvmlite": 0o755, "/kvmlite/modules.d": 0o755, "/mnt": 0o755, "/proc": 0o555,
    "/root": 0o700, "/run": 0o755, "/sys": 0o555, "/tmp": 0o1777, "/var": 0o755, "/var/tmp": 0o1777,
}  # fmt: skip
_FILES = {
    "/etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "/etc/group": b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "/etc/hosts": b"127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
    "/etc/shells": b"/bin/sh\n",
}
_BUSYBOX = "/bin/busybox"
# busybox's head and tail do not know K, M and G; these two go through a script that does. (Inside busybox's own shell
# the applets are builtins, where only a path reaches the script.)
_SUFFIXES_SCRIPT = os.path.join(os.path.dirname(__file__), "gnu-suffixes.sh")
_WITH_SUFFIXES = ("/usr/bin/head", "/usr/bin/tail")
_INDEX_FILES = ("modules.dep", "modules.order", "modules.builtin", "modules.softdep", "modules.alias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Initramfs:
    """A base archive, ready to be copied into guest memory.

    Attributes:
        path: The uncompressed cpio archive; its size is a multiple of 4.
        size: Its size in bytes.
        modules: Names of the modules in it, in load order.
        builtin, missing, unknown: What became of the other wanted modules, as in ``ModulePlan``.
        memfd: -1, or an anonymous file that ``path`` stands for, because the cache could not be written;
            ``close()`` gives it back.
    """

    path: str
    size: int
    modules: tuple[str, ...]
    builtin: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    memfd: int = -1

    def has_module(self, name: str) -> bool:
        """Tell whether the guest will have this module, loaded or built in (``unknown`` counts as yes)."""
        return name in self.modules or name in self.builtin or name in self.unknown

    def close(self) -> None:
        """Release the anonymous file, if there is one; the archive must not be opened afterwards."""
        if self.memfd >= 0:
            os.close(self.memfd)


def build_base(
    kernel: Kernel,
    features: tuple[str, ...],
    *,
    agent: str,
    busybox: str | None = None,
    modules: tuple[str, ...] = (),
    extra: Mapping[str, str | bytes] | None = None,
) -> Initramfs:
    """Return the archive for a kernel and a set of features, from the cache if it was built before.

    Args:
        kernel: The kernel it is for; its ``modules_dir`` and ``config`` are read.
        features: Names from ``modules.FEATURES``.
        agent: Path of the agent program, which becomes ``/init``.
        busybox: Path of a static busybox; found (or downloaded) if None.
        modules: Further modules to load, by name, after those of the features.
        extra: Further files: path in the guest to a file on the host (executable if that is) or to bytes (mode 0644).

    Raises:
        ImageError: A module, the agent or busybox is damaged or cannot be read.
        ConfigError: An unknown feature; an extra file in the place of one of ours.

    Thread: any. Blocks on disk; safe while other processes build the same.
    """
    from kvmlite.images.busybox import find_busybox
    from kvmlite.images.initramfs_cache import BaseCache

    inputs = _Inputs(kernel, wanted_modules(features, modules), agent, busybox or find_busybox(), extra or {})
    cache = BaseCache()
    key = inputs.key()
    found = cache.find(key)
    if found is not None:
        return found
    plan = plan_modules(kernel.modules_dir, inputs.wanted, config=kernel.config)
    signatures = [file_signature(module.path) for module in plan.load]
    tree = inputs.tree(plan)
    return cache.add(key, tree, plan, signatures)


def build_overlay(conf: Mapping[str, str], extra: Mapping[str, str | bytes] | None = None) -> bytes:
    """Return a small archive that follows the base in memory (``boot.initrd`` puts it at a multiple of 4 bytes).

    Args:
        conf: The lines of ``/kvmlite/agent.conf``.
        extra: Further files, as for :func:`build_base`; they replace files of the base.

    Raises:
        ConfigError: A key or value that is no single line.
    """
    tree = CpioTree()
    lines = []
    for name, value in conf.items():
        is_name = name != "" and all(byte.isalnum() or byte in "_.-" for byte in name) and name.isascii()
        if not is_name or not value.isprintable():
            raise ConfigError(f"agent setting {name!r}={value!r} is not a single line of text")
        lines.append(f"{name}={value}\n")
    tree.directory("/kvmlite")
    tree.file("/kvmlite/agent.conf", "".join(lines).encode(), 0o600)
    for path, data, mode in _read_extra(extra or {}):
        tree.file(path, data, mode)
    return tree.to_bytes()


def file_signature(path: str) -> list[str | int]:
    """Return what changes when a file does: path, size, mtime, ctime (ns) and inode; path alone if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return [path]
    return [path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


class _Inputs:
    """Everything that goes into a base archive, read once."""

    def __init__(
        self, kernel: Kernel, wanted: tuple[str, ...], agent: str, busybox: str, extra: Mapping[str, str | bytes]
    ) -> None:
        self.kernel = kernel
        self.wanted = wanted
        self.agent = agent
        self.busybox = busybox
        self.extra = _read_extra(extra)

    def key(self) -> str:
        """Return the name of the archive in the cache: a digest of all inputs but the module files themselves.

        Files count by their signature, not their contents: reading and hashing 2 MB of busybox would take 20 ms per run.
        """
        import hashlib

        directory = self.kernel.modules_dir
        index = [file_signature(os.path.join(directory, name)) for name in _INDEX_FILES] if directory else []
        config = file_signature(self.kernel.config) if self.kernel.config else []
        programs = [file_signature(path) for path in (self.agent, self.busybox, _SUFFIXES_SCRIPT)]
        names = (1, self.kernel.release, directory, index, config, self.wanted, programs)
        digest = hashlib.sha256(repr(names).encode())
        for path, data, mode in self.extra:
            digest.update(repr((path, mode, len(data))).encode() + data)
        return digest.hexdigest()

    def tree(self, plan: ModulePlan) -> CpioTree:
        """Put the archive together. Raises ImageError for a module that is damaged or of another kernel."""
        from kvmlite.images.busybox import applets

        tree = CpioTree()
        for path, mode in _DIRECTORIES.items():
            tree.directory(path, mode)
        tree.device("/dev/console", 0o600, 5, 1)
        tree.device("/dev/null", 0o666, 1, 3)
        for path, data in _FILES.items():
            tree.file(path, data)
        tree.file("/init", _read_program(self.agent, "the guest agent"), 0o755)
        tree.file(_BUSYBOX, _read_program(self.busybox, "busybox"), 0o755)
        for path in _WITH_SUFFIXES:
            tree.file(path, _read_program(_SUFFIXES_SCRIPT, "a script of kvmlite's", b"#!"), 0o755)
        for name in applets(self.busybox):
            if "/" + name not in tree:
                tree.symlink("/" + name, _BUSYBOX)
        for module in plan.load:
            data = load_module(module.path, release=self.kernel.release)
            tree.file(f"/kvmlite/modules.d/{module.name}.ko", data)
        order = "".join([f"/kvmlite/modules.d/{module.name}.ko\n" for module in plan.load])
        tree.file("/kvmlite/modules", order.encode())
        for path, data, mode in self.extra:
            tree.file(path, data, mode)
        return tree


def _read_program(path: str, what: str, magic: bytes = b"\x7fELF") -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ImageError(f"cannot read {what} {path}: {error.strerror or error}") from error
    if not data.startswith(magic):
        raise ImageError(f"{what} {path} is not {'an ELF program' if magic[0] == 0x7F else 'a script'}")
    return data


def _read_extra(extra: Mapping[str, str | bytes]) -> list[tuple[str, bytes, int]]:
    files = []
    for path, source in sorted(extra.items()):
        if isinstance(source, bytes):
            files.append((path, source, 0o644))
            continue
        try:
            with open(source, "rb") as file:
                mode = 0o755 if os.fstat(file.fileno()).st_mode & 0o111 else 0o644
                files.append((path, file.read(), mode))
        except OSError as error:
            raise ImageError(f"cannot read {source} (for {path} in the guest): {error.strerror or error}") from error
    return files
