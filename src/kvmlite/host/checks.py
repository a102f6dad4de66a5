"""What the host has for microVMs besides KVM: network, vsock, memory, limits. Each check is one finding.

None of these stops a microVM from running: their findings are ``ok``, ``info`` or ``warn``.
"""

from __future__ import annotations

import errno
import os

from kvmlite.host.facts import (
    CAP_NET_ADMIN,
    CAP_SYS_PTRACE,
    available_memory,
    cgroup_memory_limit,
    cgroup_mounts,
    has_capability,
    huge_pages,
    is_container,
    soft_limit,
)
from kvmlite.host.finding import INFO, OK, WARN, Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.host.facts import HostFiles

DEFAULT_MEMORY = 256 << 20
"""RAM of a microVM that asks for none, in bytes."""

_MIN_OPEN_FILES = 1024
_FILES_PER_MACHINE = 40
_TUN = "/dev/net/tun"
_FORWARDING = "/proc/sys/net/ipv4/ip_forward"
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
_USERFAULTFD = "/dev/userfaultfd"
_USERFAULTFD_SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"


def host_findings(files: HostFiles) -> list[Finding]:
    """All findings of this module, in the order they are shown."""
    return [
        memory(files),
        huge_page_pool(files),
        transparent_huge_pages(files),
        userfaultfd(files),
        cgroups(files),
        open_files(files),
        locked_memory(files),
        tun(files),
        user_network(files),
        nat(files),
        shared_directories(files),
        disk_formats(files),
        vhost(files, "vhost-net", "/dev/vhost-net", "vhost_net", "virtio-net"),
        vhost(files, "vhost-vsock", "/dev/vhost-vsock", "vhost_vsock", "virtio-vsock"),
    ]


def memory(files: HostFiles) -> Finding:
    """Whether a microVM of the default size fits."""
    available, limit = available_memory(files), cgroup_memory_limit(files)
    if available is None:
        return Finding(
            id="memory", status=INFO, seen="/proc/meminfo does not tell", meaning="how many microVMs fit is unknown"
        )
    seen = f"{available >> 20} MiB available"
    if limit is not None:
        seen += f", {limit >> 20} MiB allowed by this process's cgroup"
        available = min(available, limit)
    if available < DEFAULT_MEMORY:
        return Finding(
            id="memory",
            status=WARN,
            seen=seen,
            meaning="a microVM of the default 256 MiB may be killed for lack of memory",
            fix="free memory, raise the cgroup's limit, or give the microVM less (--memory 64M)",
        )
    count = available // DEFAULT_MEMORY
    return Finding(
        id="memory",
        status=OK,
        seen=seen,
        meaning=f"enough for {count} microVM{'s' if count > 1 else ''} of 256 MiB if each touches all of it",
    )


def huge_page_pool(files: HostFiles) -> Finding:
    """The pool of 2 MiB pages that ``hugepages`` memory comes from."""
    pages = huge_pages(files)
    seen = f"{pages.free} of {pages.total} pages of 2 MiB free in the pool"
    if pages.free:
        return Finding(
            id="huge-page-pool",
            status=OK,
            seen=seen,
            meaning=f"up to {2 * pages.free} MiB of guest memory can come from it",
        )
    return Finding(
        id="huge-page-pool",
        status=INFO,
        seen=seen,
        meaning="machines with hugepages memory cannot start; others can",
        fix="sudo sysctl vm.nr_hugepages=128 (128 pages for each 256 MiB)",
    )


def transparent_huge_pages(files: HostFiles) -> Finding:
    """Whether ordinary guest memory is backed by 2 MiB pages: kvmlite leaves that to the host's policy."""
    mode = huge_pages(files).transparent
    if mode == "always":
        return Finding(id="transparent-huge-pages", status=OK, seen=mode, meaning="guest memory gets 2 MiB pages")
    small = "guest memory gets 4 KiB pages: more page faults when a guest starts, more TLB misses later"
    if not mode:
        return Finding(id="transparent-huge-pages", status=INFO, seen="not in this kernel", meaning=small)
    return Finding(
        id="transparent-huge-pages",
        status=INFO,
        seen=mode,
        meaning=small,
        fix="echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    )


def userfaultfd(files: HostFiles) -> Finding:
    """Whether this user may serve page faults of a guest: they are taken in kernel mode, inside KVM."""
    sysctl, has_device = files.read(_USERFAULTFD_SYSCTL), files.exists(_USERFAULTFD)
    ways = (
        ("vm.unprivileged_userfaultfd=1", sysctl == "1"),
        (f"{_USERFAULTFD} can be opened", has_device and files.open_error(_USERFAULTFD) == 0),
        ("allowed by CAP_SYS_PTRACE", sysctl is not None and has_capability(files, CAP_SYS_PTRACE)),
    )
    for seen, is_allowed in ways:
        if is_allowed:
            return Finding(id="userfaultfd", status=OK, seen=seen, meaning="guest memory can be filled on demand")
    meaning = "guest memory cannot be filled on demand; booting does not need it"
    if sysctl is None and not has_device:
        return Finding(id="userfaultfd", status=INFO, seen="not in this kernel (CONFIG_USERFAULTFD)", meaning=meaning)
    command = (
        f"sudo setfacl -m u:$USER:rw {_USERFAULTFD}" if has_device else "sudo sysctl vm.unprivileged_userfaultfd=1"
    )
    return Finding(id="userfaultfd", status=INFO, seen="not for this user", meaning=meaning, fix=command)


def cgroups(files: HostFiles) -> Finding:
    """Which cgroup version limits can be set with."""
    mounts = cgroup_mounts(files)
    unified = next((mount for mount in mounts if mount.version == 2), None)
    if unified is not None and all(mount.version == 2 for mount in mounts):
        extra = ", favordynmods" if "favordynmods" in unified.options else ""
        return Finding(
            id="cgroup",
            status=OK,
            seen=f"version 2 at {unified.path}{extra}",
            meaning="microVMs can be limited and accounted like any process",
        )
    if mounts:
        return Finding(
            id="cgroup",
            status=INFO,
            seen="version 2 beside version 1" if unified else "version 1",
            meaning="microVMs run; limits have to be set per controller",
            fix="boot with systemd.unified_cgroup_hierarchy=1",
        )
    return Finding(
        id="cgroup", status=INFO, seen="none mounted", meaning="microVMs run, but cannot be limited by cgroup"
    )


def open_files(files: HostFiles) -> Finding:
    """Whether the descriptors of a few machines fit into the limit."""
    limit = soft_limit(files, "Max open files")
    if limit is None:
        return Finding(id="open-files", status=OK, seen="no limit", meaning="any number of microVMs fits in a process")
    meaning = f"room for about {limit // _FILES_PER_MACHINE} microVMs with many devices in one process"
    if limit < _MIN_OPEN_FILES:
        return Finding(
            id="open-files", status=WARN, seen=f"up to {limit}", meaning=meaning, fix=f"ulimit -n {_MIN_OPEN_FILES}"
        )
    return Finding(id="open-files", status=OK, seen=f"up to {limit}", meaning=meaning)


def locked_memory(files: HostFiles) -> Finding:
    """The limit on locked memory: shown because people look for it; kvmlite locks none."""
    limit = soft_limit(files, "Max locked memory")
    seen = "no limit" if limit is None else f"up to {limit >> 10} KiB"
    return Finding(id="locked-memory", status=INFO, seen=seen, meaning="kvmlite locks no memory, any limit will do")


def tun(files: HostFiles) -> Finding:
    """Whether TAP interfaces can be used."""
    error = files.open_error(_TUN)
    if error:
        return Finding(
            id="tun",
            status=WARN,
            seen=f"{_TUN}: {os.strerror(error)}",
            meaning="microVMs run, but have no network over TAP",
            fix=_device_fix(files, _TUN, "tun", error),
        )
    seen = f"{_TUN} can be opened"
    if has_capability(files, CAP_NET_ADMIN):
        return Finding(id="tun", status=OK, seen=seen, meaning="TAP interfaces can be made and used")
    return Finding(
        id="tun",
        status=INFO,
        seen=seen,
        meaning="TAP interfaces made for this user can be used; making one needs CAP_NET_ADMIN",
        fix="sudo ip tuntap add tap0 mode tap user $USER",
    )


def user_network(files: HostFiles) -> Finding:
    """Whether guests can have a network without root."""
    if files.find_program("passt"):
        return Finding(
            id="user-network", status=OK, seen="passt is installed", meaning="guests can have a network without root"
        )
    return Finding(
        id="user-network",
        status=INFO,
        seen="passt is not installed",
        meaning="--net user is not possible",
        fix="sudo apt-get install passt",
    )


def nat(files: HostFiles) -> Finding:
    """Whether guests can be put behind the host's addresses."""
    if not files.find_program("nft"):
        return Finding(
            id="nat", status=INFO, seen="nft is not installed", meaning="--net nat is not possible",
            fix="sudo apt-get install nftables",
        )  # fmt: skip
    is_forwarding = files.read(_FORWARDING) == "1"
    seen = f"nft is installed, IP forwarding is {'on' if is_forwarding else 'off'}"
    if not has_capability(files, CAP_NET_ADMIN):
        return Finding(id="nat", status=INFO, seen=seen, meaning="--net nat needs root; --net user does not")
    meaning = "--net nat is possible" + ("" if is_forwarding else "; forwarding is on while such a guest runs")
    return Finding(id="nat", status=OK, seen=seen, meaning=meaning)


def shared_directories(files: HostFiles) -> Finding:
    """Whether guests can see directories of the host."""
    if any(files.exists(path) for path in _VIRTIOFSD) or files.find_program("virtiofsd"):
        return Finding(
            id="shared-directories", status=OK, seen="virtiofsd is installed", meaning="--mount and --root are possible"
        )
    return Finding(
        id="shared-directories",
        status=INFO,
        seen="virtiofsd is not installed",
        meaning="--mount and --root are not possible",
        fix="sudo apt-get install qemu-system-common",
    )


def disk_formats(files: HostFiles) -> Finding:
    """Whether guests can have disks that are not raw."""
    program = "qemu-storage-daemon"
    if files.find_program(program):
        return Finding(
            id="disk-formats",
            status=OK,
            seen=f"{program} is installed",
            meaning="disks can be qcow2, VMDK, VDI or VHDX",
        )
    return Finding(
        id="disk-formats",
        status=INFO,
        seen=f"{program} is not installed",
        meaning="disks can only be raw",
        fix="sudo apt-get install qemu-utils",
    )


def vhost(files: HostFiles, name: str, device: str, module: str, serves: str) -> Finding:
    """Whether the kernel can serve a device's rings."""
    error = files.open_error(device)
    if error == 0:
        return Finding(
            id=name, status=OK, seen=f"{device} can be opened", meaning=f"the kernel can serve {serves} rings"
        )
    return Finding(
        id=name,
        status=INFO,
        seen=f"{device}: {os.strerror(error)}",
        meaning=f"{serves} rings are served by kvmlite itself",
        fix=_device_fix(files, device, module, error),
    )


def _device_fix(files: HostFiles, device: str, module: str, error: int) -> str:
    """How to get at a device node that cannot be opened."""
    if error == errno.EACCES:
        group = files.writers_group(device)
        if group in ("", "root"):
            return f"sudo setfacl -m u:$USER:rw {device} (until the next boot)"
        return f"sudo usermod -aG {group} $USER, then log in again"
    if error == errno.EPERM:
        return f"start the container with --device {device} (systemd: DeviceAllow={device} rw)"
    if is_container(files):
        return f"on the host: sudo modprobe {module}; start the container with --device {device}"
    return f"sudo modprobe {module}"
