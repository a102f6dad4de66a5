"""Findings about the host beside KVM, on small trees of our own."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmlite.host import checks
from kvmlite.host.facts import HostFiles
from kvmlite.host.finding import STATUSES


class ScriptedFiles(HostFiles):
    """A tree in which opening a device fails as told."""

    def __init__(self, root: str, errors: dict[str, int]) -> None:
        super().__init__(root)
        self.errors = errors

    def open_error(self, name: str) -> int:
        return self.errors.get(name) or super().open_error(name)


@pytest.fixture
def tree(tree, tmp_path):
    def make(contents: dict[str, str], errors: dict[str, int] | None = None) -> HostFiles:
        tree(contents)
        return ScriptedFiles(str(tmp_path), errors or {})

    return make


def test_an_empty_tree_gives_every_finding_and_none_that_stops_a_machine(tree):
    findings = checks.host_findings(tree({}))
    assert [finding.id for finding in findings] == [
        "memory",
        "huge-page-pool",
        "transparent-huge-pages",
        "userfaultfd",
        "cgroup",
        "open-files",
        "locked-memory",
        "tun",
        "user-network",
        "nat",
        "shared-directories",
        "disk-formats",
        "vhost-net",
        "vhost-vsock",
    ]
    assert {finding.status for finding in findings} <= set(STATUSES) - {"fail"}


def test_every_warning_says_what_to_do(tree):
    limits = "Max open files            256                  256                  files     \n"
    files = tree({"/proc/self/limits": limits, "/proc/meminfo": "MemAvailable: 1024 kB\n"})
    warnings = [finding for finding in checks.host_findings(files) if finding.status == "warn"]
    assert {finding.id for finding in warnings} == {"memory", "open-files", "tun"}
    assert all(finding.fix for finding in warnings)


def test_memory_counts_microvms_of_the_default_size(tree):
    found = checks.memory(tree({"/proc/meminfo": "MemAvailable: 1048576 kB\n"}))
    assert (found.status, found.seen) == ("ok", "1024 MiB available")
    assert found.meaning.startswith("enough for 4 microVMs of 256 MiB")


def test_memory_is_short_when_the_cgroup_allows_little(tree):
    found = checks.memory(
        tree(
            {
                "/proc/meminfo": "MemAvailable: 1048576 kB\n",
                "/proc/self/cgroup": "0::/\n",
                "/proc/self/mountinfo": "35 24 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
                "/sys/fs/cgroup/memory.max": "104857600\n",
            }
        )
    )
    assert (found.status, found.seen) == ("warn", "1024 MiB available, 100 MiB allowed by this process's cgroup")


def test_free_huge_pages_are_counted_in_mib(tree):
    pool = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    found = checks.huge_page_pool(tree({f"{pool}/nr_hugepages": "128", f"{pool}/free_hugepages": "100"}))
    assert (found.status, found.meaning) == ("ok", "up to 200 MiB of guest memory can come from it")


def test_an_empty_pool_is_no_fault(tree):
    found = checks.huge_page_pool(tree({}))
    assert (found.status, found.fix) == ("info", "sudo sysctl vm.nr_hugepages=128 (128 pages for each 256 MiB)")


@pytest.mark.parametrize(
    ("modes", "status"),
    [("[always] madvise never", "ok"), ("always [madvise] never", "info"), ("always madvise [never]", "info")],
)
def test_guest_memory_gets_huge_pages_only_where_all_memory_does(tree, modes, status):
    found = checks.transparent_huge_pages(tree({"/sys/kernel/mm/transparent_hugepage/enabled": modes}))
    assert found.status == status


@pytest.mark.parametrize(
    ("contents", "errors", "status", "seen"),
    [
        ({"/proc/sys/vm/unprivileged_userfaultfd": "1"}, {}, "ok", "vm.unprivileged_userfaultfd=1"),
        ({"/dev/userfaultfd": ""}, {}, "ok", "/dev/userfaultfd can be opened"),
        ({"/dev/userfaultfd": ""}, {"/dev/userfaultfd": errno.EACCES}, "info", "not for this user"),
        ({"/proc/sys/vm/unprivileged_userfaultfd": "0"}, {}, "info", "not for this user"),
        (
            {"/proc/sys/vm/unprivileged_userfaultfd": "0", "/proc/self/status": "CapEff: 0000000000080000"},
            {},
            "ok",
            "allowed by CAP_SYS_PTRACE",
        ),
        ({"/proc/self/status": "CapEff: 0000000000080000"}, {}, "info", "not in this kernel (CONFIG_USERFAULTFD)"),
    ],
)
def test_userfaultfd_is_allowed_by_sysctl_device_or_capability(tree, contents, errors, status, seen):
    found = checks.userfaultfd(tree(contents, errors))
    assert (found.status, found.seen) == (status, seen)


V1 = "36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2 = "35 24 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,favordynmods\n"


@pytest.mark.parametrize(
    ("mounts", "seen"),
    [
        (V2, "version 2 at /sys/fs/cgroup, favordynmods"),
        (V1, "version 1"),
        (V1 + V2, "version 2 beside version 1"),
        ("", "none mounted"),
    ],
)
def test_cgroup_version_is_told(tree, mounts, seen):
    assert checks.cgroups(tree({"/proc/self/mountinfo": mounts})).seen == seen


def test_tun_is_whole_with_cap_net_admin(tree):
    found = checks.tun(tree({"/dev/net/tun": "", "/proc/self/status": "CapEff: 0000000000001000"}))
    assert (found.status, found.fix) == ("ok", "")


def test_tun_without_cap_net_admin_needs_an_interface_made_by_root(tree):
    found = checks.tun(tree({"/dev/net/tun": ""}))
    assert (found.status, found.fix) == ("info", "sudo ip tuntap add tap0 mode tap user $USER")


def test_missing_tun_is_mended_by_loading_the_module(tree):
    found = checks.tun(tree({}))
    assert (found.status, found.seen, found.fix) == (
        "warn",
        "/dev/net/tun: No such file or directory",
        "sudo modprobe tun",
    )


def test_missing_tun_in_a_container_is_mended_on_the_host(tree):
    found = checks.tun(tree({"/.dockerenv": ""}))
    assert found.fix == "on the host: sudo modprobe tun; start the container with --device /dev/net/tun"


def test_a_private_vhost_device_is_mended_by_permission(tree):
    files = tree({"/dev/vhost-net": ""}, {"/dev/vhost-net": errno.EACCES})
    Path(files.path("/dev/vhost-net")).chmod(0o600)
    found = checks.vhost(files, "vhost-net", "/dev/vhost-net", "vhost_net", "virtio-net")
    assert (found.status, found.seen) == ("info", "/dev/vhost-net: Permission denied")
    assert found.fix == "sudo setfacl -m u:$USER:rw /dev/vhost-net (until the next boot)"


@pytest.mark.parametrize("mark", ["/.dockerenv", "/etc/hostname"])
def test_a_forbidden_device_is_a_matter_of_groups_in_a_container_too(tree, mark):
    files = tree({"/dev/net/tun": "", mark: ""}, {"/dev/net/tun": errno.EACCES})
    files.writers_group = lambda name: "netdev"
    assert checks.tun(files).fix == "sudo usermod -aG netdev $USER, then log in again"


def test_a_device_cgroup_is_told_apart_from_permissions(tree):
    found = checks.tun(tree({"/dev/net/tun": ""}, {"/dev/net/tun": errno.EPERM}))
    assert found.fix == "start the container with --device /dev/net/tun (systemd: DeviceAllow=/dev/net/tun rw)"


def test_user_networking_needs_passt(tree):
    found = checks.user_network(tree({}))
    assert (found.status, found.fix) == ("info", "sudo apt-get install passt")
    assert checks.user_network(tree({"/usr/bin/passt": ""})).status == "ok"


def test_shared_directories_and_disk_formats_need_their_programs(tree):
    found = checks.shared_directories(tree({}))
    assert (found.status, found.fix) == ("info", "sudo apt-get install qemu-system-common")
    found = checks.disk_formats(tree({}))
    assert (found.status, found.fix) == ("info", "sudo apt-get install qemu-utils")
    files = tree({"/usr/lib/qemu/virtiofsd": "", "/usr/bin/qemu-storage-daemon": ""})
    assert checks.shared_directories(files).status == "ok"
    assert checks.disk_formats(files).status == "ok"


def test_nat_needs_nft_and_rights(tree):
    assert checks.nat(tree({})).fix == "sudo apt-get install nftables"
    assert "needs root" in checks.nat(tree({"/usr/sbin/nft": ""})).meaning
    found = checks.nat(tree({"/usr/sbin/nft": "", "/proc/self/status": "CapEff: 0000000000001000"}))
    assert (found.status, found.seen) == ("ok", "nft is installed, IP forwarding is off")
    assert "while such a guest runs" in found.meaning
    assert "while" not in checks.nat(tree({"/proc/sys/net/ipv4/ip_forward": "1"})).meaning
