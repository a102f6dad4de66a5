"""Opening /dev/kvm when it is not there, not ours, or not KVM."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmlite.abi.kvm import exit_reason_name
from kvmlite.errors import HostError, KvmError
from kvmlite.kvm.ioctl import ioctl
from kvmlite.kvm.system import Kvm, open_hint


def test_a_missing_device_says_what_to_load(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot open .*/kvm: No such file or directory") as caught:
        Kvm(str(tmp_path / "kvm"))
    assert caught.value.errno == errno.ENOENT
    assert "modprobe kvm_intel or kvm_amd" in caught.value.hint


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_forbidden_device_says_which_group(number: int) -> None:
    assert "usermod -aG kvm" in open_hint(number)


def test_another_error_points_to_doctor() -> None:
    assert open_hint(errno.EIO) == "run kvmlite doctor"


def test_a_file_that_is_not_kvm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_bytes(b"")
    with pytest.raises(HostError, match="is not KVM: Inappropriate ioctl for device") as caught:
        Kvm(str(tmp_path / "kvm"))
    assert caught.value.errno == errno.ENOTTY


def test_a_failed_ioctl_names_its_call() -> None:
    with pytest.raises(KvmError, match=r"KVM_RUN\(vcpu 0\): Bad file descriptor"):
        ioctl(-1, 0xAE80, 0, "KVM_RUN(vcpu 0)")


@pytest.mark.parametrize(
    ("reason", "name"), [(2, "KVM_EXIT_IO"), (6, "KVM_EXIT_MMIO"), (8, "KVM_EXIT_SHUTDOWN"), (99, "KVM_EXIT_99")]
)
def test_exit_reasons_have_names(reason: int, name: str) -> None:
    assert exit_reason_name(reason) == name
