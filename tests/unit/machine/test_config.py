"""What a machine may be, refused before anything is opened."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvmlite.devices.rng import Rng
from kvmlite.devices.vhost_user_blk import FormattedDisk
from kvmlite.errors import ConfigError
from kvmlite.machine import Kernel, MachineConfig

KERNEL = Kernel(path="vmlinux")


@pytest.mark.parametrize(
    "values", [{}, {"vcpu_count": 1}, {"vcpu_count": 255}, {"memory_mib": 2}, {"memory_mib": 1 << 22}]
)
def test_the_limits_themselves_are_fine(values: dict[str, Any]) -> None:
    config = MachineConfig(kernel=KERNEL, **values)
    assert config.kernel is KERNEL


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vcpu_count": 0}, "0 vCPUs asked for; a machine has 1 to 255"),
        ({"vcpu_count": 256}, "256 vCPUs asked for; a machine has 1 to 255"),
        ({"vcpu_count": 2, "acpi": False}, "2 vCPUs asked for without ACPI"),
        ({"devices": (Rng(),) * 12, "acpi": False}, "12 devices asked for; without ACPI 11 are reached"),
        ({"memory_mib": 1}, "1 MiB of memory asked for; a machine has 2 to 4194304 MiB"),
        ({"memory_mib": (1 << 22) + 1}, "4194305 MiB of memory asked for"),
        ({"memory_backing": "disk"}, "unknown memory backing 'disk'; choose one of anonymous, memfd, hugepages"),
    ],
)
def test_beyond_the_limits_is_a_config_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MachineConfig(kernel=KERNEL, **values)


def test_an_unknown_protocol_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="unknown boot protocol 'uefi'; choose one of auto, linux, pvh, multiboot"):
        Kernel(path="vmlinux", protocol="uefi")


def test_a_changed_copy_is_checked_again() -> None:
    config = MachineConfig(kernel=KERNEL)
    assert dataclasses.replace(config, memory_mib=512).memory_mib == 512
    with pytest.raises(ConfigError):
        dataclasses.replace(config, memory_mib=0)


def test_the_defaults_are_a_small_quiet_machine() -> None:
    config = MachineConfig(kernel=KERNEL)
    assert (config.vcpu_count, config.memory_mib, config.memory_backing, config.devices) == (1, 256, "anonymous", ())
    assert (config.console_fd, config.console_input_fd, config.agent_serial, config.acpi) == (-1, -1, False, True)


def test_a_device_that_another_process_serves_makes_memory_shared() -> None:
    disk = FormattedDisk(path="x", format="vdi")
    assert MachineConfig(kernel=KERNEL, devices=(disk,)).effective_backing == "memfd"
    assert MachineConfig(kernel=KERNEL, devices=(disk,), memory_backing="hugepages").effective_backing == "hugepages"
    assert MachineConfig(kernel=KERNEL).effective_backing == "anonymous"
