"""Exceptions of kvmlite: whose fault it was, what was attempted, what to do.

Every exception a user can see derives from :class:`KvmliteError`; its text is one line that names the thing,
and ``hint``, where there is one, says how to mend it.
"""

from __future__ import annotations

import os


class KvmliteError(Exception):
    """Base of all kvmlite errors.

    Attributes:
        hint: What the user can do about it, one line; empty if there is nothing to suggest.
    """

    def __init__(self, *args: object, hint: str = "") -> None:
        super().__init__(*args)
        self.hint = hint


class ConfigError(KvmliteError, ValueError):
    """The request itself is wrong; raised before any file descriptor is opened."""


class ImageError(KvmliteError):
    """A file given to kvmlite (kernel, initrd, module, archive) is not what it has to be."""


class HostError(KvmliteError, OSError):
    """The host refused something: a system call failed.

    ``errno`` is set, so callers can match on it as with any ``OSError``.
    """

    def __init__(self, message: str, errno: int = 0, *, hint: str = "") -> None:
        KvmliteError.__init__(self, message, hint=hint)
        self.errno = errno
        self.strerror = os.strerror(errno) if errno else None

    def __str__(self) -> str:
        return str(self.args[0])


class KvmError(HostError):
    """A KVM ioctl failed: the call, its arguments and errno travel together."""

    def __init__(self, call: str, errno: int, *, hint: str = "") -> None:
        super().__init__(f"{call}: {os.strerror(errno)}", errno, hint=hint)
        self.call = call


class UnsupportedError(KvmliteError):
    """The host or its KVM lacks a named capability."""


class BootError(KvmliteError):
    """The guest never came up.

    Attributes:
        console: The last lines the guest printed, decoded leniently; empty if it printed none.
    """

    def __init__(self, message: str, *, console: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.console = console


class StateError(KvmliteError):
    """The object is not in a state in which the call makes sense (already stopped, not started)."""


class GuestFault(KvmliteError):  # internal: never leaves the VMM
    """The guest's driver broke the rules of its device; turned into DEVICE_NEEDS_RESET in one place."""
