"""Stock kernels, as the distribution ships them, through every way in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Command

from .conftest import PACKAGES

Kernels = Callable[[str], Path]


def release_of(package: Path) -> str:
    (image,) = (package / "boot").glob("vmlinuz-*")
    return image.name.removeprefix("vmlinuz-")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_debian_kernel_boots_unmodified(kvmlite: Command, kernels: Kernels, name: str) -> None:
    package = kernels(name)
    ended = kvmlite("run", "--kernel", package, "--", "uname", "-r", timeout_s=280)
    assert (ended.code, ended.stdout.decode().strip(), ended.stderr) == (0, release_of(package), "")


@pytest.mark.parametrize("name", ["6.1-cloud", "6.12-cloud"])
def test_its_vmlinux_boots(kvmlite: Command, kernels: Kernels, kvmlite_home: Path, tmp_path: Path, name: str) -> None:
    package = kernels(name)
    release = release_of(package)
    (tmp_path / "boot").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/modules").symlink_to(package / "lib/modules")
    shutil.copyfile(package / "boot" / f"config-{release}", tmp_path / "boot" / f"config-{release}")
    vmlinux = tmp_path / "boot" / f"vmlinux-{release}"
    unpack(package / "boot" / f"vmlinuz-{release}", vmlinux, kvmlite_home / "cache/vmlinux")
    ended = kvmlite("run", "--kernel", vmlinux, "--", "uname", "-r", timeout_s=280)
    assert (ended.code, ended.stdout.decode().strip(), ended.stderr) == (0, release, "")


def unpack(bzimage: Path, vmlinux: Path, cache: Path) -> None:
    from kvmlite.boot import open_kernel
    from kvmlite.boot.unpack import unpack as unpack_kernel

    with open_kernel(bzimage) as image, unpack_kernel(image, cache) as unpacked:
        shutil.copyfile(f"/proc/self/fd/{unpacked.fd}", vmlinux)


def test_a_kernel_may_unpack_itself(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite("run", "--no-unpack", "--kernel", kernel, "--", "sh", "-c", "exit 3", timeout_s=280)
    assert (ended.code, ended.stderr) == (3, "")


def test_without_acpi_the_agent_is_reached_over_a_serial_port(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite(
        "run", "--no-acpi", "--kernel", kernel, "--", "sh", "-c", "sleep 1; cat /kvmlite/agent.conf", timeout_s=280
    )
    assert (ended.code, ended.stdout, ended.stderr) == (0, b"channel=serial\n", "")


def test_without_acpi_a_virtio_channel_is_refused(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite("run", "--no-acpi", "--channel", "vsock", "--kernel", kernel, "--", "true")
    assert ended.code == 125
    assert "finds no virtio devices without ACPI, which --channel vsock needs" in ended.complaint


@pytest.mark.parametrize("channel", ["vsock", "console", "serial"])
def test_the_agent_speaks_through_the_channel_asked_for(kvmlite: Command, kernel: Path, channel: str) -> None:
    script = "cat /kvmlite/agent.conf; wc -c >&2; exit 3"
    ended = kvmlite(
        "run", "--channel", channel, "--kernel", kernel, "--", "sh", "-c", script, input=b"x" * 20_000, timeout_s=280
    )
    assert (ended.code, ended.stdout, ended.stderr) == (3, f"channel={channel}\n".encode(), "20000\n")


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_guest_has_the_vcpus_asked_for(kvmlite: Command, kernel: Path, count: int) -> None:
    ended = kvmlite("run", "--cpus", str(count), "--kernel", kernel, "--", "nproc", timeout_s=280)
    assert (ended.code, ended.stdout, ended.stderr) == (0, f"{count}\n".encode(), "")


def test_a_boot_keeps_within_its_budget_of_exits(kvmlite: Command, kernel: Path) -> None:
    import json

    ended = kvmlite("run", "--json", "--kernel", kernel, "--", "true", timeout_s=280)
    report = json.loads(ended.stderr)
    print(f"{report['exits']} exits, {report['python_exits']} of them handled in Python: {report['exits_by_reason']}")
    assert ended.code == 0
    assert report["outcome"] == "Exited"
    assert report["python_exits"] < 500
    assert report["exits"] < 2000
