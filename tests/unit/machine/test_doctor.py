"""Findings about KVM, on small trees of our own and with measurements made up."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmlite.errors import HostError, KvmError, UnsupportedError
from kvmlite.host.finding import Finding
from kvmlite.kvm.system import open_hint
from kvmlite.machine import doctor
from kvmlite.machine.doctor import KvmFacts

NAMES = (*doctor.REQUIRED_CAPABILITIES, *doctor.OPTIONAL_CAPABILITIES)
ALL = dict.fromkeys(NAMES, 1) | {"MAX_VCPUS": 1024}
GOOD = KvmFacts(capabilities=ALL, ring0_speed=3e9, create_ms=0.4)
AMD = {
    "/dev/kvm": "",
    "/proc/cpuinfo": "flags : fpu svm avic\n",
    "/sys/module/kvm_amd/parameters/npt": "Y\n",
    "/sys/module/kvm_amd/parameters/avic": "N\n",
    "/sys/module/kvm_amd/parameters/nested": "1\n",
}


def by_id(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.id: finding for finding in findings}


def refused(number: int, text: str) -> KvmFacts:
    return KvmFacts(error=HostError(f"cannot open /dev/kvm: {text}", number, hint=open_hint(number)), capabilities={})


def test_a_good_amd_host_can_run_machines(tree):
    findings = doctor.kvm_findings(tree(AMD), GOOD)
    assert doctor.can_run(findings)
    assert doctor.verdict(findings) == "microVMs can run here"
    assert [(finding.id, finding.status) for finding in findings] == [
        ("kvm-device", "ok"),
        ("kvm-access", "ok"),
        ("kvm-capabilities", "ok"),
        ("kvm-vcpus", "ok"),
        ("kvm-speed", "ok"),
        ("kvm-create", "ok"),
        ("nesting", "ok"),
        ("nested-paging", "ok"),
        ("interrupts", "info"),
        ("nested-guests", "info"),
    ]


def test_real_kvm_names_its_technology(tree):
    assert (
        by_id(doctor.kvm_findings(tree(AMD), GOOD))["kvm-speed"].meaning
        == "real KVM (AMD-V) at the processor's own speed"
    )


def test_software_kvm_cannot_run_machines(tree):
    findings = doctor.kvm_findings(tree({"/dev/kvm": ""}), KvmFacts(capabilities=ALL, ring0_speed=2e6, create_ms=0.4))
    assert by_id(findings)["kvm-speed"].status == "fail"
    assert doctor.verdict(findings).startswith(
        "microVMs cannot run here: ring-0 guest code runs at 2.0 million instructions/s; a software KVM: "
        "a stock kernel would need about 8 minutes to boot; use a host"
    )


def test_kvm_that_runs_no_ring0_code_cannot_run_machines(tree):
    findings = doctor.kvm_findings(tree({"/dev/kvm": ""}), KvmFacts(capabilities=ALL, ring0_speed=0.0, create_ms=0.4))
    assert by_id(findings)["kvm-speed"].seen == "ring-0 guest code does not run"
    assert not doctor.can_run(findings)


def test_an_emulated_amd_host_is_slow_but_real(tree):
    findings = doctor.kvm_findings(tree(AMD), KvmFacts(capabilities=ALL, ring0_speed=1e8, create_ms=0.4))
    speed = by_id(findings)["kvm-speed"]
    assert (speed.status, doctor.can_run(findings)) == ("warn", True)
    assert speed.meaning.startswith("real KVM (AMD-V), but on an emulated")


@pytest.mark.parametrize("name", doctor.REQUIRED_CAPABILITIES)
def test_a_missing_required_capability_stops_machines(tree, name):
    facts = KvmFacts(capabilities={**ALL, name: 0}, ring0_speed=3e9, create_ms=0.4)
    findings = doctor.kvm_findings(tree(AMD), facts)
    failed = [finding for finding in findings if finding.status == "fail"]
    assert [finding.seen for finding in failed] == [f"KVM_CAP_{name} is missing"]


def test_a_missing_optional_capability_stops_nothing(tree):
    facts = KvmFacts(capabilities={**ALL, "TSC_DEADLINE_TIMER": 0}, ring0_speed=3e9, create_ms=0.4)
    findings = doctor.kvm_findings(tree(AMD), facts)
    assert by_id(findings)["kvm-tsc-deadline-timer"].status == "info"
    assert doctor.can_run(findings)


@pytest.mark.parametrize(
    ("contents", "meaning", "fix"),
    [
        ({"/proc/cpuinfo": "flags : fpu vmx\n"}, "the module kvm_intel is not active", "sudo modprobe kvm_intel;"),
        ({"/proc/cpuinfo": "flags : fpu svm\n"}, "the module kvm_amd is not active", "sudo modprobe kvm_amd;"),
        (
            {"/proc/cpuinfo": "flags : fpu hypervisor\n"},
            "without nested virtualisation",
            "enable nested virtualisation",
        ),
        ({"/proc/cpuinfo": "flags : fpu\n"}, "neither VT-x nor AMD-V", "firmware setup"),
        ({"/proc/misc": "232 kvm\n"}, "device node is missing", "sudo mknod -m 660 /dev/kvm c 10 232"),
        ({"/proc/misc": "232 kvm\n", "/.dockerenv": ""}, "container was not given", "--device /dev/kvm"),
        (
            {"/proc/cpuinfo": "flags : vmx\n", "/.dockerenv": ""},
            "kvm_intel is not active",
            "on the host: sudo modprobe",
        ),
    ],
)
def test_a_missing_device_is_explained(tree, contents, meaning, fix):
    findings = doctor.kvm_findings(tree(contents), refused(errno.ENOENT, "No such file or directory"))
    found = by_id(findings)["kvm-device"]
    assert found.status == "fail"
    assert meaning in found.meaning
    assert fix in found.fix
    assert "kvm-access" not in by_id(findings)


def test_collect_on_an_empty_tree_says_why_machines_cannot_run(tree):
    findings = doctor.collect(tree({}))
    assert doctor.verdict(findings).startswith("microVMs cannot run here: /dev/kvm does not exist; ")


def test_collect_tells_a_file_that_is_not_kvm(tree):
    found = by_id(doctor.collect(tree({"/dev/kvm": ""})))["kvm-access"]
    assert (found.status, found.meaning) == ("fail", "/dev/kvm is not the KVM device")


def test_a_forbidden_device_names_the_group(tree):
    files = tree({"/dev/kvm": "", "/etc/group": "root:x:0:\n"})
    files.writers_group = lambda name: "kvm"
    found = by_id(doctor.kvm_findings(files, refused(errno.EACCES, "Permission denied")))["kvm-access"]
    assert (found.status, found.seen) == ("fail", "cannot open /dev/kvm: Permission denied")
    assert (found.meaning, found.fix) == (
        "only members of the group kvm may use KVM",
        "sudo usermod -aG kvm $USER, then log in again",
    )


def test_a_device_of_root_alone_is_given_to_a_group(tree):
    files = tree({"/dev/kvm": ""})
    Path(files.path("/dev/kvm")).chmod(0o600)
    found = by_id(doctor.kvm_findings(files, refused(errno.EACCES, "Permission denied")))["kvm-access"]
    assert found.fix.startswith("sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm")


@pytest.mark.parametrize(
    ("facts", "meaning"),
    [
        (refused(errno.EPERM, "Operation not permitted"), "a device cgroup or a sandbox forbids it"),
        (refused(errno.ENODEV, "No such device"), "the processor shows neither VT-x nor AMD-V (no vmx or svm flag)"),
        (
            KvmFacts(error=KvmError("KVM_CREATE_VM", errno.EBUSY), capabilities={}),
            "another hypervisor holds the processor's virtualisation",
        ),
        (KvmFacts(error=KvmError("KVM_CREATE_VM", errno.ENOMEM), capabilities={}), "KVM does not work"),
        (
            KvmFacts(error=UnsupportedError("/dev/kvm speaks KVM API version 11; kvmlite needs 12"), capabilities={}),
            "this is not the KVM of Linux since 2.6.22",
        ),
    ],
)
def test_every_way_to_be_refused_has_its_meaning_and_fix(tree, facts, meaning):
    found = by_id(doctor.kvm_findings(tree({"/dev/kvm": ""}), facts))["kvm-access"]
    assert (found.status, found.meaning) == ("fail", meaning)
    assert found.fix


V2 = "35 24 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 {options}\n"
NX = "/sys/module/kvm/parameters/nx_huge_pages"
MULTIHIT = "/sys/devices/system/cpu/vulnerabilities/itlb_multihit"
REMOUNT = "sudo mount -o remount,favordynmods /sys/fs/cgroup (Linux 6.0 or newer)"
NEVER = f"while no VM runs: echo never | sudo tee {NX}"


@pytest.mark.parametrize(
    ("contents", "fix"),
    [
        (
            {"/proc/self/mountinfo": V2.format(options="rw"), NX: "N", MULTIHIT: "Not affected"},
            f"{REMOUNT}, or {NEVER}",
        ),
        ({"/proc/self/mountinfo": V2.format(options="rw,favordynmods"), NX: "N", MULTIHIT: "Not affected"}, NEVER),
        ({"/proc/self/mountinfo": V2.format(options="rw"), NX: "never"}, REMOUNT),
        (
            {NX: "Y", MULTIHIT: "KVM: Mitigation: Split huge pages"},
            f"{NEVER} (only if all guests are trusted: it protects this processor from iTLB multihit)",
        ),
        ({NX: "never"}, "try again while the host is idle"),
    ],
)
def test_slow_creation_is_explained_with_what_is_left_to_do(tree, contents, fix):
    facts = KvmFacts(capabilities=ALL, ring0_speed=3e9, create_ms=35.0)
    findings = doctor.kvm_findings(tree({**AMD, **contents}), facts)
    found = by_id(findings)["kvm-create"]
    assert (found.status, found.fix) == ("warn", fix)
    assert found.seen == f"KVM_CREATE_VM takes 35.0 ms, nx_huge_pages={contents[NX]}"
    assert doctor.can_run(findings)


def test_missing_nested_paging_is_a_warning_with_the_module_option(tree):
    found = by_id(doctor.kvm_findings(tree({**AMD, "/sys/module/kvm_amd/parameters/npt": "N"}), GOOD))["nested-paging"]
    assert (found.status, found.seen) == ("warn", "kvm_amd npt=N")
    assert "sudo modprobe kvm_amd npt=1" in found.fix


def test_intel_parameters_are_read_on_intel(tree):
    parameters = "/sys/module/kvm_intel/parameters"
    files = tree(
        {
            "/dev/kvm": "",
            "/proc/cpuinfo": "flags : vmx hypervisor\n",
            f"{parameters}/ept": "Y",
            f"{parameters}/enable_apicv": "Y",
            f"{parameters}/nested": "N",
            "/sys/class/dmi/id/product_name": "Big Cloud",
        }
    )
    found = by_id(doctor.kvm_findings(files, GOOD))
    assert [found[name].seen for name in ("nested-paging", "interrupts", "nested-guests")] == [
        "kvm_intel ept=Y",
        "kvm_intel enable_apicv=Y",
        "kvm_intel nested=N",
    ]
    assert found["nesting"].seen == "hypervisor flag in /proc/cpuinfo, Big Cloud"
