"""Can microVMs run on this host, and what would make them run better? The findings behind ``kvmlite doctor``.

``measure_kvm`` does everything that touches KVM; the rest turns what it and the host's files say into findings.
"""

from __future__ import annotations

import errno
import time

from kvmlite.abi import kvm as abi
from kvmlite.errors import HostError, KvmError, KvmliteError, UnsupportedError
from kvmlite.host.checks import host_findings
from kvmlite.host.facts import (
    cgroup_mounts,
    cpu_flags,
    is_container,
    is_on,
    is_virtual_machine,
    kvm_module,
    machine_name,
    virtualization_flag,
)
from kvmlite.host.finding import FAIL, INFO, OK, WARN, Finding
from kvmlite.kvm import probe
from kvmlite.kvm.system import DEFAULT_PATH, Kvm
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.host.facts import HostFiles

REQUIRED_CAPABILITIES = (
    "IRQCHIP",
    "USER_MEMORY",
    "SET_TSS_ADDR",
    "SET_IDENTITY_MAP_ADDR",
    "EXT_CPUID",
    "MP_STATE",
    "IRQ_ROUTING",
    "IRQFD",
    "IOEVENTFD",
    "IMMEDIATE_EXIT",
    "MAX_VCPUS",
)

OPTIONAL_CAPABILITIES = {
    "TSC_DEADLINE_TIMER": "guests program the LAPIC timer by counting instead: one more exit per timer",
    "READONLY_MEM": "each interrupt of a device is one more exit; persistent memory cannot be made read-only",
    "COALESCED_MMIO": "each interrupt of a device is one more exit",
}

SLOW_CREATE_MS = 10.0
_CREATE_ROUNDS = 5
_NATIVE_SPEED = 500_000_000
_NX_HUGE_PAGES = "/sys/module/kvm/parameters/nx_huge_pages"
_ITLB_MULTIHIT = "/sys/devices/system/cpu/vulnerabilities/itlb_multihit"
_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmFacts:
    """What KVM said and how fast it was.

    Attributes:
        error: Why it cannot be used; the rest then says nothing.
        capabilities: Name without ``KVM_CAP_`` -> answer of KVM_CHECK_EXTENSION.
        ring0_speed: Guest ring-0 instructions per second; 0 if they do not run at all.
        create_ms: Median time of KVM_CREATE_VM in milliseconds.
    """

    error: KvmliteError | None = None
    capabilities: dict[str, int]
    ring0_speed: float = 0.0
    create_ms: float = 0.0


def collect(files: HostFiles, kvm_path: str = DEFAULT_PATH) -> list[Finding]:
    """Look at everything.

    Args:
        files: The host's files.
        kvm_path: The KVM device, below the root of ``files``.

    Thread: any. Blocks: about 10 ms, 0.3 s where KVM_CREATE_VM is slow.
    """
    facts = measure_kvm(files.path(kvm_path))
    return [*kvm_findings(files, facts, kvm_path), *host_findings(files)]


def measure_kvm(path: str) -> KvmFacts:
    """Ask KVM what it can do, and time it."""
    try:
        with Kvm(path) as kvm:
            names = (*REQUIRED_CAPABILITIES, *OPTIONAL_CAPABILITIES)
            return KvmFacts(
                capabilities={name: kvm.check_extension(getattr(abi, f"KVM_CAP_{name}")) for name in names},
                create_ms=_measure_create(kvm),
                ring0_speed=_measure_speed(kvm),
            )
    except (HostError, UnsupportedError) as error:
        return KvmFacts(error=error, capabilities={})


def _measure_create(kvm: Kvm) -> float:
    """Median time of KVM_CREATE_VM in milliseconds."""
    times = []
    for _ in range(_CREATE_ROUNDS):
        started = time.perf_counter()
        vm = kvm.create_vm()
        times.append(time.perf_counter() - started)
        vm.close()
    return sorted(times)[_CREATE_ROUNDS // 2] * 1e3


def _measure_speed(kvm: Kvm) -> float:
    try:
        return probe.refresh_ring0_speed(kvm)
    except UnsupportedError:  # ring-0 code does not run at all: that is slower than any limit
        return 0.0


def kvm_findings(files: HostFiles, facts: KvmFacts, kvm_path: str = DEFAULT_PATH) -> list[Finding]:
    """Findings about the processor and KVM, in the order they are shown."""
    findings = [device(files, kvm_path)]
    if findings[0].status == OK:
        findings.append(access(files, facts, kvm_path))
    if facts.error is None:
        findings += [*capabilities(facts), vcpus(facts), speed(files, facts), create_time(files, facts)]
    findings += [nesting(files), *module_features(files)]
    return findings


def device(files: HostFiles, path: str) -> Finding:
    """Whether the device node exists, and why not."""
    if files.exists(path):
        module = kvm_module(files)
        return Finding(
            id="kvm-device",
            status=OK,
            seen=f"{path} exists" + (f", module {module}" if module else ""),
            meaning="the device node is there",
        )
    meaning, fix = _why_no_device(files, path)
    return Finding(id="kvm-device", status=FAIL, seen=f"{path} does not exist", meaning=meaning, fix=fix)


def _why_no_device(files: HostFiles, path: str) -> tuple[str, str]:
    """What a missing device node means, and what to do."""
    flag = virtualization_flag(files)
    if any(line.split()[1:] == ["kvm"] for line in (files.read("/proc/misc") or "").splitlines()):
        if is_container(files):
            return (
                "KVM is loaded, but this container was not given the device",
                f"start the container with --device {path}",
            )
        return (
            "KVM is loaded, but its device node is missing",
            f"sudo mknod -m 660 {path} c 10 232 && sudo chgrp kvm {path}",
        )
    if flag:
        module = _MODULES[flag]
        meaning = f"the processor has {_technology(flag)}, but the module {module} is not active"
        fix = f"sudo modprobe {module}; if that says 'Operation not supported', enable {_technology(flag)} in the firmware setup"
        if is_container(files):
            fix = f"on the host: {fix}; then start the container with --device {path}"
        return meaning, fix
    if is_virtual_machine(files):
        return (
            "this host is a virtual machine without nested virtualisation (no vmx or svm flag)",
            "enable nested virtualisation for it in its hypervisor (QEMU: -cpu host on a host with kvm_intel.nested=1 or "
            "kvm_amd.nested=1), or choose a cloud instance type that has it",
        )
    return (
        "the processor shows neither VT-x nor AMD-V (no vmx or svm flag)",
        "enable VT-x, or SVM on AMD, in the firmware setup; if it is not there, use another machine",
    )


def _technology(flag: str) -> str:
    return "VT-x" if flag == "vmx" else "AMD-V"


def access(files: HostFiles, facts: KvmFacts, path: str) -> Finding:
    """Whether this user may open the device, and whether it is the KVM we know."""
    error = facts.error
    if error is None:
        return Finding(
            id="kvm-access",
            status=OK,
            seen=f"opened, API version {abi.KVM_API_VERSION}",
            meaning="this user may use KVM",
        )
    meaning, fix = _why_no_access(files, error, path)
    return Finding(id="kvm-access", status=FAIL, seen=str(error), meaning=meaning, fix=fix)


def _why_no_access(files: HostFiles, error: KvmliteError, path: str) -> tuple[str, str]:
    if isinstance(error, UnsupportedError):
        return "this is not the KVM of Linux since 2.6.22", "boot a stock Linux kernel"
    number = error.errno if isinstance(error, HostError) else 0
    if isinstance(error, KvmError):
        if number == errno.EBUSY:
            return (
                "another hypervisor holds the processor's virtualisation",
                "stop it (VirtualBox: sudo modprobe -r vboxdrv)",
            )
        return "KVM does not work", "look for kvm in the kernel's log: sudo dmesg | grep -i kvm"
    if number == errno.EACCES:
        return _why_forbidden(files, path)
    if number == errno.EPERM:
        return (
            "a device cgroup or a sandbox forbids it",
            f"start the container with --device {path} (systemd: DeviceAllow={path} rw)",
        )
    if number in (errno.ENODEV, errno.ENXIO):  # a static node, without a driver behind it
        return _why_no_device(files, path)
    return f"{path} is not the KVM device", f"ls -l {path} must show character device 10, 232; reboot, or make it so"


def _why_forbidden(files: HostFiles, path: str) -> tuple[str, str]:
    group = files.writers_group(path)
    if group in ("", "root"):
        return (
            "no group of ordinary users may use KVM",
            f"sudo chgrp kvm {path} && sudo chmod 660 {path} && sudo usermod -aG kvm $USER, then log in again",
        )
    if is_container(files):
        return (
            f"only members of the group {group} may use KVM",
            f"start the container with --group-add $(stat -c %g {path})",
        )
    return f"only members of the group {group} may use KVM", f"sudo usermod -aG {group} $USER, then log in again"


def capabilities(facts: KvmFacts) -> list[Finding]:
    """One finding if KVM has all that kvmlite uses, else one for each that is missing."""
    missing = []
    for name in REQUIRED_CAPABILITIES:
        if not facts.capabilities[name]:
            missing.append(
                Finding(
                    id=f"kvm-{_slug(name)}",
                    status=FAIL,
                    seen=f"KVM_CAP_{name} is missing",
                    meaning="kvmlite needs it",
                    fix="use a stock Linux kernel of 4.12 or newer on this host",
                )
            )
    for name, meaning in OPTIONAL_CAPABILITIES.items():
        if not facts.capabilities[name]:
            missing.append(
                Finding(id=f"kvm-{_slug(name)}", status=INFO, seen=f"KVM_CAP_{name} is missing", meaning=meaning)
            )
    if missing:
        return missing
    count = len(facts.capabilities)
    return [
        Finding(id="kvm-capabilities", status=OK, seen=f"all {count} that kvmlite uses", meaning="this KVM is complete")
    ]


def _slug(name: str) -> str:
    return name.lower().replace("_", "-")


def vcpus(facts: KvmFacts) -> Finding:
    """How many vCPUs a machine may have."""
    most = facts.capabilities["MAX_VCPUS"]
    return Finding(id="kvm-vcpus", status=OK, seen=f"up to {most}", meaning="vCPUs per microVM that KVM allows")


def speed(files: HostFiles, facts: KvmFacts) -> Finding:
    """Whether this is KVM on a processor or in software."""
    seen = f"ring-0 guest code runs at {facts.ring0_speed / 1e6:.1f} million instructions/s"
    if facts.ring0_speed <= 0:
        return Finding(
            id="kvm-speed",
            status=FAIL,
            seen="ring-0 guest code does not run",
            meaning="this host's /dev/kvm cannot run a kernel",
            fix=probe.SOFTWARE_WAY_OUT,
        )
    if facts.ring0_speed < probe.SOFTWARE_SPEED_LIMIT:
        return Finding(
            id="kvm-speed",
            status=FAIL,
            seen=seen,
            meaning=f"a software KVM: a stock kernel would need about {probe.boot_minutes(facts.ring0_speed)} to boot",
            fix=probe.SOFTWARE_WAY_OUT,
        )
    flag = virtualization_flag(files)
    kind = f"real KVM ({_technology(flag)})" if flag else "real KVM"
    if facts.ring0_speed < _NATIVE_SPEED:
        return Finding(
            id="kvm-speed",
            status=WARN,
            seen=seen,
            meaning=f"{kind}, but on an emulated or very busy processor: a stock kernel needs many seconds to boot",
            fix="for speed, use a host whose processor is not emulated",
        )
    return Finding(id="kvm-speed", status=OK, seen=seen, meaning=f"{kind} at the processor's own speed")


def create_time(files: HostFiles, facts: KvmFacts) -> Finding:
    """Whether making a VM is slow, as it is where KVM's huge-page recovery thread has to join a cgroup."""
    mode = files.read(_NX_HUGE_PAGES)
    seen = f"KVM_CREATE_VM takes {facts.create_ms:.1f} ms" + (f", nx_huge_pages={mode}" if mode else "")
    if facts.create_ms <= SLOW_CREATE_MS:
        return Finding(id="kvm-create", status=OK, seen=seen, meaning="making a VM costs a start little")
    meaning = (
        "each start waits for it; usually KVM's huge-page recovery thread, which joins a cgroup after a grace period"
    )
    return Finding(id="kvm-create", status=WARN, seen=seen, meaning=meaning, fix=_create_fix(files))


def _create_fix(files: HostFiles) -> str:
    steps = []
    unified = next((mount for mount in cgroup_mounts(files) if mount.version == 2), None)
    if unified and "favordynmods" not in unified.options:
        steps.append(f"sudo mount -o remount,favordynmods {unified.path} (Linux 6.0 or newer)")
    if files.read(_NX_HUGE_PAGES) not in (None, "never"):
        never = f"while no VM runs: echo never | sudo tee {_NX_HUGE_PAGES}"
        if files.read(_ITLB_MULTIHIT) not in (None, "Not affected"):
            never += " (only if all guests are trusted: it protects this processor from iTLB multihit)"
        steps.append(never)
    return ", or ".join(steps) or "try again while the host is idle"


def nesting(files: HostFiles) -> Finding:
    """Whether the host is a virtual machine itself."""
    if not is_virtual_machine(files):
        return Finding(id="nesting", status=OK, seen="no hypervisor flag", meaning="this host is no virtual machine")
    name = machine_name(files)
    return Finding(
        id="nesting",
        status=INFO,
        seen="hypervisor flag in /proc/cpuinfo" + (f", {name}" if name else ""),
        meaning="this host is a virtual machine: KVM here is nested or in software, and each exit costs several times more",
    )


def module_features(files: HostFiles) -> list[Finding]:
    """Nested paging, interrupt virtualisation and nested guests, from the parameters of the KVM module."""
    flag = virtualization_flag(files)
    module = kvm_module(files)
    if not flag or module != _MODULES[flag]:
        return []
    return [
        _paging(files, module, "ept" if flag == "vmx" else "npt"),
        _apicv(files) if flag == "vmx" else _avic(files),
        _nested_guests(files, module),
    ]


def _paging(files: HostFiles, module: str, name: str) -> Finding:
    value = files.parameter(module, name)
    seen = f"{module} {name}={value}"
    if is_on(value):
        return Finding(
            id="nested-paging", status=OK, seen=seen, meaning="the processor translates guest memory by itself"
        )
    return Finding(
        id="nested-paging",
        status=WARN,
        seen=seen,
        meaning="each change of a guest's page tables leaves the guest",
        fix=f"sudo modprobe -r {module} && sudo modprobe {module} {name}=1; if it stays off, the processor lacks it",
    )


def _apicv(files: HostFiles) -> Finding:
    value = files.parameter("kvm_intel", "enable_apicv")
    return _interrupts(f"kvm_intel enable_apicv={value}", "APICv", is_on=is_on(value), fix="")


def _avic(files: HostFiles) -> Finding:
    value = files.parameter("kvm_amd", "avic")
    has_avic = "avic" in cpu_flags(files)
    fix = "sudo modprobe -r kvm_amd && sudo modprobe kvm_amd avic=1" if has_avic else ""
    return _interrupts(f"kvm_amd avic={value}", "AVIC", is_on=is_on(value), fix=fix)


def _interrupts(seen: str, feature: str, *, is_on: bool, fix: str) -> Finding:
    if is_on:
        return Finding(
            id="interrupts", status=OK, seen=seen, meaning=f"{feature} delivers interrupts without leaving the guest"
        )
    return Finding(
        id="interrupts",
        status=INFO,
        seen=seen,
        meaning=f"no {feature}: interrupts and their acknowledgement leave the guest",
        fix=fix,
    )


def _nested_guests(files: HostFiles, module: str) -> Finding:
    value = files.parameter(module, "nested")
    meaning = "guests may run KVM themselves" if is_on(value) else "guests cannot run KVM themselves"
    return Finding(id="nested-guests", status=INFO, seen=f"{module} nested={value}", meaning=meaning)


def can_run(findings: list[Finding]) -> bool:
    """Whether a microVM can run: no finding says that it cannot."""
    return all(finding.status != FAIL for finding in findings)


def verdict(findings: list[Finding]) -> str:
    """The last line: whether microVMs can run here, else why not and the way out."""
    failed = next((finding for finding in findings if finding.status == FAIL), None)
    if failed is None:
        return "microVMs can run here"
    return f"microVMs cannot run here: {failed.seen}; {failed.meaning}; {failed.fix}"
