"""Errors: whose fault, what text, what hint."""

from __future__ import annotations

import errno

import pytest

from kvmlite import errors


def test_every_error_is_a_kvmlite_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) >= 9
    assert all(issubclass(kind, errors.KvmliteError) for kind in kinds)


def test_a_hint_is_empty_unless_given() -> None:
    assert errors.ConfigError("bad").hint == ""
    assert errors.ConfigError("bad", hint="do it").hint == "do it"
    assert str(errors.ConfigError("bad", hint="do it")) == "bad"


def test_a_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="bad"):
        raise errors.ConfigError("bad")


def test_a_host_error_is_an_os_error_with_errno() -> None:
    error = errors.HostError("cannot open x: No such file or directory", errno.ENOENT, hint="make it")
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror) == (errno.ENOENT, "No such file or directory")
    assert str(error) == "cannot open x: No such file or directory"
    assert error.hint == "make it"


def test_a_host_error_without_errno_has_no_strerror() -> None:
    assert errors.HostError("odd").strerror is None


def test_a_kvm_error_names_call_and_errno() -> None:
    error = errors.KvmError("KVM_CREATE_VCPU(vcpu_id=3)", errno.EEXIST)
    assert str(error) == "KVM_CREATE_VCPU(vcpu_id=3): File exists"
    assert (error.call, error.errno) == ("KVM_CREATE_VCPU(vcpu_id=3)", errno.EEXIST)


def test_a_boot_error_carries_the_console() -> None:
    assert errors.BootError("never came up").console == ""
    assert errors.BootError("never came up", console="last line").console == "last line"
