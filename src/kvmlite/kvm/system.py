"""``/dev/kvm``: the system file descriptor."""

from __future__ import annotations

import errno
import os

from kvmlite._native import ffi
from kvmlite.abi import kvm_ioctls as ioctls
from kvmlite.abi.kvm import KVM_API_VERSION
from kvmlite.errors import HostError, KvmError, UnsupportedError
from kvmlite.kvm.ioctl import ioctl
from kvmlite.kvm.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_PATH = "/dev/kvm"
_CPUID_ENTRIES = 256


def open_hint(error_number: int) -> str:
    """What to do when the device cannot be opened."""
    if error_number == errno.ENOENT:
        return (
            "load the kernel module (modprobe kvm_intel or kvm_amd) and enable VT-x or AMD-V in the firmware; "
            "in a cloud VM choose a type with nested virtualisation"
        )
    if error_number in (errno.EACCES, errno.EPERM):
        return "add yourself to the group that owns it: sudo usermod -aG kvm $USER, then log in again"
    return "run kvmlite doctor"


class Kvm:
    """The KVM subsystem: capabilities, and where VMs are made.

    Thread: any. Owns its file descriptor; a context manager.
    """

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or 0
            raise HostError(f"cannot open {path}: {os.strerror(number)}", number, hint=open_hint(number)) from error
        try:
            self._check_version()
            self._run_size = ioctl(self.fd, ioctls.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
        except BaseException:
            self.close()
            raise

    def _check_version(self) -> None:
        try:
            version = self.api_version()
        except KvmError as error:
            number = error.errno or 0
            raise HostError(f"{self.path} is not KVM: {os.strerror(number)}", number) from error
        if version != KVM_API_VERSION:
            raise UnsupportedError(f"{self.path} speaks KVM API version {version}; kvmlite needs {KVM_API_VERSION}")

    def __enter__(self) -> Kvm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file descriptor; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def api_version(self) -> int:
        """KVM API, KVM_GET_API_VERSION: 12 since 2007."""
        return ioctl(self.fd, ioctls.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")

    def check_extension(self, capability: int) -> int:
        """KVM API, KVM_CHECK_EXTENSION: 0 if absent, else 1 or the capability's own number."""
        return ioctl(self.fd, ioctls.KVM_CHECK_EXTENSION, capability, f"KVM_CHECK_EXTENSION({capability})")

    def create_vm(self) -> Vm:
        """Make a VM. Retried when a signal interrupts it, as the kernel asks under load.

        Spec: KVM API, KVM_CREATE_VM.
        """
        while True:
            try:
                fd = ioctl(self.fd, ioctls.KVM_CREATE_VM, 0, "KVM_CREATE_VM")
            except KvmError as error:
                if error.errno == errno.EINTR:
                    continue
                raise
            return Vm(fd, run_size=self._run_size)

    def supported_cpuid(self) -> Any:
        """What KVM can give a guest: a ``struct kvm_cpuid2 *`` of the caller's own, to edit and set.

        Spec: KVM API, KVM_GET_SUPPORTED_CPUID.
        """
        cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": _CPUID_ENTRIES})
        cpuid.nent = _CPUID_ENTRIES
        ioctl(self.fd, ioctls.KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID")
        return cpuid
