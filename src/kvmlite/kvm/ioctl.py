"""One ioctl, with the call, its arguments and errno kept together when it fails."""

from __future__ import annotations

from kvmlite._native import lib
from kvmlite.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def ioctl(fd: int, request: int, argument: Any, call: str) -> int:
    """Issue an ioctl; ``call`` is how it reads in an error: ``KVM_CREATE_VCPU(vcpu_id=3)``.

    Args:
        argument: An int, or a pointer to a structure of ``ffi.new`` that the kernel may fill.

    Raises:
        KvmError: The kernel refused.
    """
    issue = lib.kvl_ioctl_value if isinstance(argument, int) else lib.kvl_ioctl_pointer
    result = int(issue(fd, request, argument))
    if result < 0:
        raise KvmError(call, -result)
    return result
