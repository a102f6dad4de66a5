"""What a test needs of the machine it runs on: markers, and the reason when it is not there.

A missing requirement skips the test with the reason. ``KVMLITE_REQUIRE=kvm,root`` turns that skip into a failure, so
that a CI machine which lost its /dev/kvm does not go green.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@cache
def kvm_missing() -> str:
    """Why /dev/kvm cannot be used; "" if it can."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm cannot be opened: {error.strerror}"
    return ""


@cache
def is_software_kvm() -> bool:
    """Whether /dev/kvm emulates guest ring 0 (about 2 million instructions a second) instead of running it.

    The processor-specific modules are what drives VT-x and AMD-V.
    """
    return not any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd"))


@cache
def root_missing() -> str:
    """Why this is not root; "" if it is."""
    return "" if os.geteuid() == 0 else f"needs root, runs as uid {os.geteuid()}"


@cache
def guest_missing() -> str:
    """Why no Linux kernel can boot here; "" if one can."""
    if kvm_missing():
        return kvm_missing()
    if os.environ.get("KVMLITE_LAB") == "1" or not is_software_kvm():
        return ""
    return "this KVM is a software one and cannot boot Linux: run it in the lab (scripts/lab pytest tests/guest)"


@cache
def lab_host_missing() -> str:
    """Why the lab cannot be started from here; "" if it can."""
    if os.environ.get("KVMLITE_LAB") == "1":
        return "runs inside the lab already"
    if not (ROOT / "scripts/lab").exists():
        return "scripts/lab is not part of this checkout"
    return ""


def _programs_missing(*names: str) -> str:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in names if shutil.which(name, path=path) is None]
    return f"no {' and no '.join(missing)} on this machine" if missing else ""


def ext4_missing() -> str:
    """Why no ext4 image can be made or looked into; "" if it can. Whoever is not root needs fakeroot, too."""
    return _programs_missing("mke2fs", "debugfs", *(() if os.geteuid() == 0 else ("fakeroot",)))


def oci_missing() -> str:
    """Why no OCI image can be unpacked; "" if one can."""
    return _programs_missing("skopeo", "umoci", *(() if os.geteuid() == 0 else ("newuidmap",)))


def qemu_img_missing() -> str:
    """Why no disk format but raw can be made; "" if they can."""
    return _programs_missing("qemu-img")


def tools_missing() -> str:
    """Which of the programs that kvmlite's devices and networks call is missing; "" if none is."""
    no_virtiofsd = not any(Path(path).exists() for path in ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"))
    return _programs_missing("nft", "passt", "dnsmasq", "ip", "bridge", "qemu-io", "qemu-storage-daemon") or (
        "no virtiofsd on this machine" if no_virtiofsd else ""
    )


REQUIREMENTS: dict[str, Callable[[], str]] = {
    "kvm": kvm_missing,
    "root": root_missing,
    "guest": guest_missing,
    "lab_host": lab_host_missing,
    "ext4": ext4_missing,
    "oci": oci_missing,
    "qemu_img": qemu_img_missing,
    "tools": tools_missing,
}


def required() -> frozenset[str]:
    """Markers that ``KVMLITE_REQUIRE`` says must not be missing here.

    Raises:
        ValueError: It names a marker that does not exist.
    """
    names = frozenset(name.strip() for name in os.environ.get("KVMLITE_REQUIRE", "").split(",") if name.strip())
    unknown = names - REQUIREMENTS.keys()
    if unknown:
        raise ValueError(f"KVMLITE_REQUIRE names {', '.join(sorted(unknown))}; known: {', '.join(REQUIREMENTS)}")
    return names
