"""What is read from the host's files, on small trees of our own."""

from __future__ import annotations

import errno
import os

import pytest

from kvmlite.host import facts
from kvmlite.host.facts import CgroupMount, HugePages


def test_a_missing_file_reads_as_none(tree):
    assert tree({}).read("/proc/cpuinfo") is None


def test_a_file_is_read_without_surrounding_blanks(tree):
    assert tree({"/sys/x": " Y\n"}).read("/sys/x") == "Y"


def test_opening_a_missing_device_gives_enoent(tree):
    assert tree({}).open_error("/dev/net/tun") == errno.ENOENT


def test_a_device_that_can_be_opened_gives_zero(tree):
    assert tree({"/dev/vhost-net": ""}).open_error("/dev/vhost-net") == 0


def test_the_group_that_may_write_is_named(tree):
    files = tree({"/dev/kvm": ""})
    group = os.stat(files.path("/dev/kvm")).st_gid
    tree({"/etc/group": f"other:x:{group + 1}:\nkvm:x:{group}:\n"})
    os.chmod(files.path("/dev/kvm"), 0o660)
    assert files.writers_group("/dev/kvm") == "kvm"


def test_a_group_without_a_name_is_its_number(tree):
    files = tree({"/dev/kvm": ""})
    os.chmod(files.path("/dev/kvm"), 0o660)
    assert files.writers_group("/dev/kvm") == str(os.stat(files.path("/dev/kvm")).st_gid)


def test_no_group_may_write_a_private_device(tree):
    files = tree({"/dev/kvm": ""})
    os.chmod(files.path("/dev/kvm"), 0o600)
    assert files.writers_group("/dev/kvm") == ""


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu vmx sse", "vmx"), ("fpu svm npt", "svm"), ("fpu vmx_x", ""), ("", "")]
)
def test_virtualization_flag_is_a_whole_word_of_the_flags(tree, flags, expected):
    files = tree({"/proc/cpuinfo": f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: vmx svm\n"})
    assert facts.virtualization_flag(files) == expected


def test_vmx_flags_line_is_not_the_flags_line(tree):
    assert facts.cpu_flags(tree({"/proc/cpuinfo": "vmx flags\t: ept apicv\n"})) == frozenset()


@pytest.mark.parametrize(
    ("flag", "modules", "expected"),
    [
        ("svm", ["kvm", "kvm_amd"], "kvm_amd"),
        ("vmx", ["kvm_amd", "kvm_intel"], "kvm_intel"),
        ("", ["kvm", "kvm_other"], "kvm_other"),
        ("vmx", ["kvm", "kvm_other"], "kvm_other"),
        ("vmx", ["kvm"], ""),
    ],
)
def test_kvm_module_is_that_of_the_processor_or_the_other_one(tree, flag, modules, expected):
    files = tree({"/proc/cpuinfo": f"flags : {flag}\n", **{f"/sys/module/{name}/refcnt": "0" for name in modules}})
    assert facts.kvm_module(files) == expected


def test_machine_name_joins_vendor_and_product(tree):
    files = tree({"/sys/class/dmi/id/sys_vendor": "QEMU\n", "/sys/class/dmi/id/product_name": "Standard PC\n"})
    assert facts.machine_name(files) == "QEMU Standard PC"


@pytest.mark.parametrize("mark", ["/.dockerenv", "/run/.containerenv", "/run/systemd/container"])
def test_containers_are_known_by_their_marks(tree, mark):
    assert facts.is_container(tree({mark: ""}))


def test_no_mark_is_no_container(tree):
    assert not facts.is_container(tree({"/run/x": ""}))


@pytest.mark.parametrize(("mask", "expected"), [("0000000000001000", True), ("0000000000000fff", False)])
def test_capability_is_a_bit_of_the_effective_mask(tree, mask, expected):
    files = tree({"/proc/self/status": f"CapPrm:\tffffffffffffffff\nCapEff:\t{mask}\n"})
    assert facts.has_capability(files, facts.CAP_NET_ADMIN) is expected


LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max locked memory         8388608              unlimited            bytes
Max open files            1024                 524288               files
Max file size             unlimited            unlimited            bytes
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Max open files", 1024), ("Max locked memory", 8388608), ("Max file size", None), ("Max nice", None)],
)
def test_soft_limit_is_the_first_number(tree, name, expected):
    assert facts.soft_limit(tree({"/proc/self/limits": LIMITS}), name) == expected


def test_available_memory_is_in_bytes(tree):
    assert facts.available_memory(tree({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n"})) == 2 << 20


def test_available_memory_is_none_without_meminfo(tree):
    assert facts.available_memory(tree({})) is None


V2_MOUNT = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,favordynmods\n"
V1_MOUNT = "36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"


def test_cgroup_mounts_have_a_version_and_the_options_of_the_hierarchy(tree):
    assert facts.cgroup_mounts(tree({"/proc/self/mountinfo": V2_MOUNT + V1_MOUNT})) == (
        CgroupMount(path="/sys/fs/cgroup", version=2, options=frozenset({"rw", "nsdelegate", "favordynmods"})),
        CgroupMount(path="/sys/fs/cgroup/memory", version=1, options=frozenset({"rw", "memory"})),
    )


def test_version_2_limit_is_read_from_the_own_group(tree):
    files = tree(
        {
            "/proc/self/mountinfo": V2_MOUNT,
            "/proc/self/cgroup": "0::/user.slice/a:b\n",
            "/sys/fs/cgroup/user.slice/a:b/memory.max": "1073741824\n",
        }
    )
    assert facts.cgroup_memory_limit(files) == 1 << 30


def test_version_1_limit_is_read_from_the_memory_hierarchy(tree):
    files = tree(
        {
            "/proc/self/mountinfo": V1_MOUNT,
            "/proc/self/cgroup": "9:name=systemd:/\n4:memory:/app\n0::/\n",
            "/sys/fs/cgroup/memory/app/memory.limit_in_bytes": "536870912\n",
        }
    )
    assert facts.cgroup_memory_limit(files) == 512 << 20


@pytest.mark.parametrize(
    ("mount", "name", "value"),
    [
        (V2_MOUNT, "/sys/fs/cgroup/memory.max", "max"),
        (V1_MOUNT, "/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
    ],
)
def test_no_limit_is_none(tree, mount, name, value):
    files = tree({"/proc/self/mountinfo": mount, "/proc/self/cgroup": "4:memory:/\n0::/\n", name: value})
    assert facts.cgroup_memory_limit(files) is None


def test_huge_pages_are_the_pool_and_the_bracketed_mode(tree):
    files = tree(
        {
            "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "128\n",
            "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "100\n",
            "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        }
    )
    assert facts.huge_pages(files) == HugePages(total=128, free=100, transparent="madvise")


def test_a_kernel_without_huge_pages_has_none(tree):
    assert facts.huge_pages(tree({})) == HugePages(total=0, free=0, transparent="")
