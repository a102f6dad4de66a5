"""What a test needs of the machine it runs on: markers, and the reason when it is not there.

A missing requirement skips the test with the reason. ``KVMLITE_REQUIRE=kvm,root`` turns that skip into a failure, so
that a CI machine which lost its /dev/kvm does not go green. What only the test itself finds out it says by ``lack``.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

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


def clang() -> str | None:
    """Path of a clang, whatever its version."""
    names = ("clang", *(f"clang-{number}" for number in range(22, 13, -1)))
    return next((path for name in names if (path := shutil.which(name))), None)


def clang_missing() -> str:
    """Why nothing is compiled with clang; "" if it is."""
    return "" if clang() else "clang is not installed"


def _device_missing(path: str, module: str) -> str:
    return "" if os.access(path, os.R_OK | os.W_OK) else f"{path} cannot be opened: sudo modprobe {module}"


@cache
def kernels_missing() -> str:
    """Why there are no stock kernels; "" if there are."""
    package = kernel_package("linux-image-cloud-amd64")
    return "" if package.is_dir() else f"no {package}: scripts/setup kernels"


def kernel_package(package: str) -> Path:
    """Where the unpacked package of a stock kernel is, if it is."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KVMLITE_TEST_KERNELS") or cache / "kvmlite/lab/kernels") / package


@cache
def images_missing() -> str:
    """Why there is no Debian image; "" if there is."""
    return "" if debian_image().exists() else f"no {debian_image()}: scripts/setup images"


def debian_image() -> Path:
    """Where the Debian image is that ``scripts/setup images`` makes, if it is."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KVMLITE_TEST_IMAGES") or cache / "kvmlite/lab/images") / "names/debian"


@cache
def faults_missing() -> str:
    """Why there can be no disk that fails at will; "" if there can."""
    if missing := root_missing() or _programs_missing("dmsetup", "losetup", "fio"):
        return missing
    loaded = subprocess.run(["modprobe", "-a", "dm_mod", "loop"], capture_output=True, text=True, check=False)
    return f"needs the kernel's device mapper: {loaded.stderr.strip()}" if loaded.returncode else ""


def _open_files_missing() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return "" if limit >= 1088 else f"a process may open {limit} files here, 1088 are needed"


def _seen_by_the_test() -> str:
    return ""


REQUIREMENTS: dict[str, Callable[[], str]] = {
    "kvm": kvm_missing,
    "root": root_missing,
    "guest": guest_missing,
    "lab_host": lab_host_missing,
    "ext4": ext4_missing,
    "oci": oci_missing,
    "qemu_img": qemu_img_missing,
    "tools": tools_missing,
    "fakeroot": lambda: _programs_missing("fakeroot"),
    "compressors": lambda: _programs_missing("lz4", "zstd"),
    "clang": clang_missing,
    "iasl": lambda: _programs_missing("iasl"),
    "cpio": lambda: _programs_missing("cpio"),
    "git": lambda: "" if (ROOT / ".git").exists() else "not a git checkout",
    "kernels": kernels_missing,
    "images": images_missing,
    "lab": lambda: "" if os.environ.get("KVMLITE_LAB") == "1" else "runs in the lab only",
    "vhost_net": lambda: _device_missing("/dev/vhost-net", "vhost_net"),
    "vhost_vsock": lambda: _device_missing("/dev/vhost-vsock", "vhost_vsock"),
    "faults": faults_missing,
    "open_files": _open_files_missing,
    "hugepages": _seen_by_the_test,
    "io_uring": _seen_by_the_test,
    "direct_io": _seen_by_the_test,
}
"""Marker, and why what it stands for is not there; "" if it is, or if only the test finds out."""


def lack(name: str, reason: str) -> NoReturn:
    """Skip the test, because what this marker stands for is not there; fail it if ``KVMLITE_REQUIRE`` has the name."""
    __tracebackhide__ = True
    if name not in REQUIREMENTS:
        raise ValueError(f"{name} is none of the requirements: {', '.join(REQUIREMENTS)}")
    if name in required():
        pytest.fail(f"KVMLITE_REQUIRE={name}: {reason}", pytrace=False)
    pytest.skip(reason)


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
