"""What the host's files say: processor, modules, memory, cgroups, limits. Reads only; judges nothing.

Everything is read below an injectable root, so that tests show it small trees of their own.
"""

from __future__ import annotations

import os

from kvmlite.records import dataclass

PARAMETERS = "/sys/module/{module}/parameters/{name}"
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")
CAP_NET_ADMIN = 12
CAP_SYS_PTRACE = 19
_UNLIMITED = 1 << 62
_PROGRAM_DIRECTORIES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


class HostFiles:
    """The host's files, or a tree that looks like them.

    Args:
        root: Directory that stands for ``/``.
    """

    def __init__(self, root: str = "/") -> None:
        self.root = root

    def path(self, name: str) -> str:
        """Where the absolute path ``name`` lies."""
        return os.path.join(self.root, name.lstrip("/"))

    def read(self, name: str) -> str | None:
        """The text of a file without surrounding blanks; None if it is not there or may not be read."""
        try:
            with open(self.path(name), encoding="utf-8", errors="replace") as file:
                return file.read().strip()
        except OSError:  # absent and forbidden are the same to a caller that asks what it can learn
            return None

    def exists(self, name: str) -> bool:
        """Whether there is such a file or directory."""
        return os.path.exists(self.path(name))

    def find_program(self, name: str) -> bool:
        """Whether a program is where the system keeps programs."""
        return any(self.exists(f"{directory}/{name}") for directory in _PROGRAM_DIRECTORIES)

    def names(self, name: str) -> list[str]:
        """The sorted names in a directory; none if it is not there."""
        try:
            return sorted(os.listdir(self.path(name)))
        except OSError:
            return []

    def open_error(self, name: str) -> int:
        """The errno of opening a device for reading and writing; 0 if it can be opened."""
        try:
            os.close(os.open(self.path(name), os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            return error.errno or 0
        return 0

    def writers_group(self, name: str) -> str:
        """The group that may read and write a file; empty if there is none."""
        try:
            found = os.stat(self.path(name))
        except OSError:
            return ""
        if found.st_mode & 0o060 != 0o060:
            return ""
        for line in (self.read("/etc/group") or "").splitlines():
            fields = line.split(":")
            if len(fields) > 2 and fields[2] == str(found.st_gid):
                return fields[0]
        return str(found.st_gid)

    def parameter(self, module: str, name: str) -> str | None:
        """The value of a module's parameter; None if it has none of that name."""
        return self.read(PARAMETERS.format(module=module, name=name))


def is_on(value: str | None) -> bool:
    """Whether a module's boolean parameter is set: ``Y`` or ``1``."""
    return value in ("Y", "y", "1")


def cpu_flags(files: HostFiles) -> frozenset[str]:
    """The flags of the first processor in ``/proc/cpuinfo``."""
    for line in (files.read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def virtualization_flag(files: HostFiles) -> str:
    """``vmx`` (VT-x), ``svm`` (AMD-V), or empty: Linux hides the flag if the firmware has switched it off."""
    flags = cpu_flags(files)
    return next((flag for flag in ("vmx", "svm") if flag in flags), "")


def kvm_module(files: HostFiles) -> str:
    """The KVM module of this processor if it is loaded, else any other ``kvm_*`` module; empty if there is none."""
    loaded = [name for name in files.names("/sys/module") if name.startswith("kvm_")]
    wanted = {"vmx": "kvm_intel", "svm": "kvm_amd"}.get(virtualization_flag(files), "")
    if wanted in loaded:
        return wanted
    return next((name for name in loaded if name not in ("kvm_intel", "kvm_amd")), loaded[0] if loaded else "")


def is_virtual_machine(files: HostFiles) -> bool:
    """Whether the host itself runs on a hypervisor that says so."""
    return "hypervisor" in cpu_flags(files)


def machine_name(files: HostFiles) -> str:
    """Vendor and product of the machine (``QEMU Standard PC``); empty if the firmware does not tell."""
    parts = [files.read(f"/sys/class/dmi/id/{name}") or "" for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in parts if part)


def is_container(files: HostFiles) -> bool:
    """Whether this looks like the inside of a container."""
    return any(files.exists(mark) for mark in _CONTAINER_MARKS)


def has_capability(files: HostFiles, number: int) -> bool:
    """Whether this process has a capability (capabilities(7)), by its number."""
    for line in (files.read("/proc/self/status") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> number & 1)
    return False


def soft_limit(files: HostFiles, name: str) -> int | None:
    """A soft resource limit by its name in ``/proc/self/limits``; None if unlimited or unknown."""
    for line in (files.read("/proc/self/limits") or "").splitlines():
        if line.startswith(name):
            value = line[len(name) :].split()[0]
            return int(value) if value.isdigit() else None
    return None


def available_memory(files: HostFiles) -> int | None:
    """Bytes that can be used without swapping (MemAvailable); None if unknown."""
    for line in (files.read("/proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMount:
    """A mounted cgroup hierarchy.

    Attributes:
        path: Where it is mounted.
        version: 1 or 2.
        options: Of the hierarchy (``memory``, ``favordynmods``), not of the mount point.
    """

    path: str
    version: int
    options: frozenset[str]


def cgroup_mounts(files: HostFiles) -> tuple[CgroupMount, ...]:
    """The cgroup hierarchies in ``/proc/self/mountinfo`` (proc(5): options of the hierarchy are the last field)."""
    found = []
    for line in (files.read("/proc/self/mountinfo") or "").splitlines():
        mount, separator, hierarchy = line.partition(" - ")
        fields, kinds = mount.split(), hierarchy.split()
        if separator and len(fields) > 4 and len(kinds) > 2 and kinds[0] in ("cgroup", "cgroup2"):
            version = 2 if kinds[0] == "cgroup2" else 1
            found.append(CgroupMount(path=fields[4], version=version, options=frozenset(kinds[2].split(","))))
    return tuple(found)


def cgroup_memory_limit(files: HostFiles) -> int | None:
    """Bytes this process's own cgroup may take at most; None if it has no limit. Ancestors are not looked at."""
    groups = _own_cgroups(files)
    limits = []
    for mount in cgroup_mounts(files):
        if mount.version == 2:
            group, name = groups.get("", "/"), "memory.max"
        elif "memory" in mount.options:
            group, name = groups.get("memory", "/"), "memory.limit_in_bytes"
        else:
            continue
        limit = files.read(os.path.join(mount.path, group.lstrip("/"), name)) or ""
        if limit.isdigit() and int(limit) < _UNLIMITED:
            limits.append(int(limit))
    return min(limits, default=None)


def _own_cgroups(files: HostFiles) -> dict[str, str]:
    """Controller -> path from ``/proc/self/cgroup``; version 2 is the empty controller."""
    found = {}
    for line in (files.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class HugePages:
    """The pool of 2 MiB pages, and whether ordinary memory gets them too.

    Attributes:
        total, free: Pages of 2 MiB in the pool.
        transparent: ``always``, ``madvise`` or ``never``; empty if the kernel has no transparent huge pages.
    """

    total: int
    free: int
    transparent: str


def huge_pages(files: HostFiles) -> HugePages:
    """Read the pool of 2 MiB pages and the transparent huge page mode."""
    pool = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    modes = (files.read("/sys/kernel/mm/transparent_hugepage/enabled") or "").split()
    return HugePages(
        total=int(files.read(f"{pool}/nr_hugepages") or 0),
        free=int(files.read(f"{pool}/free_hugepages") or 0),
        transparent=next((mode.strip("[]") for mode in modes if mode.startswith("[")), ""),
    )
