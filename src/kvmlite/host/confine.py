"""Run a file server in a mount namespace where a directory is at ``/mnt``, read-only if so wanted, and nothing can undo it.

    python confine.py PARENT OPTIONS... -- DIRECTORY PROGRAM ARGUMENT...

A program of its own, on the standard library alone: what it does to itself cannot be done in a process with threads. It
replaces itself by PROGRAM. PARENT is the process id of whoever started it; if that one is gone, so is this. Options:

    --read-only     no write gets through, whatever the server is made to do; holds for mounts below DIRECTORY, too
    --rootless      in a user namespace of its own, in which the caller is root; with the caller's subordinate users and groups
                    as all others, if there are any (subuid(5)) and newuidmap and newgidmap are installed
    --hide=NAME     an empty directory in the place of DIRECTORY/NAME, if it has one
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import shutil
import signal
import sys

PLACE = "/mnt"
"""Where PROGRAM finds DIRECTORY; what the host has there is out of the server's sight."""

# <linux/mount.h>, <linux/sched.h>, <linux/prctl.h>, <asm/unistd_64.h>
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_MOVE_MOUNT_F_EMPTY_PATH = 4
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_PR_SET_PDEATHSIG = 1

_SET_IDS = 'read -r _; newuidmap "$1" 0 "$2" 1 1 "$4" "$5" && newgidmap "$1" 0 "$3" 1 1 "$6" "$7"'
"""Once its input ends: process, its user and group, first and number of the subordinate users, the same of the groups."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, *arguments: object, what: str) -> int:
    return _check(int(_libc.syscall(ctypes.c_long(number), *arguments)), what)


def _die_with_parent(parent: int) -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    if os.getppid() != parent:
        raise SystemExit(1)


def subordinate_ids() -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return (first, count) of the caller's subordinate users and groups, as text; None if they cannot be used."""
    found = [_subordinate_range(path) for path in ("/etc/subuid", "/etc/subgid")]
    users, groups = found
    if users is None or groups is None or not (shutil.which("newuidmap") and shutil.which("newgidmap")):
        return None
    return users, groups


def _subordinate_range(path: str) -> tuple[str, str] | None:
    uid = os.geteuid()
    try:
        names = [str(uid), pwd.getpwuid(uid).pw_name]
    except KeyError:  # an id without a name
        names = [str(uid)]
    try:
        with open(path) as file:
            entries = [line.strip().split(":") for line in file]
    except OSError:
        return None
    return next(((first, count) for name, first, count in (e for e in entries if len(e) == 3) if name in names), None)


def _unshare_as_root_of_my_own() -> None:
    uid, gid = os.geteuid(), os.getegid()
    subordinate = subordinate_ids()
    if subordinate is None:
        _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return
    # The ids of a namespace are set from outside it, by programs that may: a child stays there, and waits for us to go.
    reader, writer = os.pipe()
    (first_uid, uids), (first_gid, gids) = subordinate
    numbers = [str(number) for number in (os.getpid(), uid, gid)]
    child = os.posix_spawn(
        "/bin/sh", ["sh", "-c", _SET_IDS, "sh", *numbers, first_uid, uids, first_gid, gids], os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)],
    )  # fmt: skip
    os.close(reader)
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER), "unshare")
    os.close(writer)
    if os.waitpid(child, 0)[1] != 0:
        raise OSError(0, "newuidmap or newgidmap failed")


def _enter_namespaces(*, rootless: bool) -> None:
    if rootless:
        _unshare_as_root_of_my_own()
    else:
        _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount of / as private")


def _place(directory: str, *, read_only: bool) -> None:
    """Put a copy of the directory's mounts at PLACE. It has its attributes before anybody can reach it."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    tree = _syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(directory), ctypes.c_uint(flags), what="open_tree")
    attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | (_MOUNT_ATTR_RDONLY if read_only else 0)
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # struct mount_attr: set, clear, propagation, user namespace
    _syscall(
        _SYS_MOUNT_SETATTR, tree, b"", ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE), wanted,
        ctypes.c_size_t(ctypes.sizeof(wanted)), what="mount_setattr",
    )  # fmt: skip
    place = PLACE.encode()
    _syscall(
        _SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, place, ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH), what=f"mount at {PLACE}"
    )
    os.close(tree)


def _hide(name: str) -> None:
    path = os.path.join(PLACE, name)
    if os.path.isdir(path) and not os.path.islink(path):
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        options = b"mode=0755,nr_inodes=1"
        _check(_libc.mount(b"none", os.fsencode(path), b"tmpfs", ctypes.c_ulong(flags), options), f"mount at {path}")


def main(arguments: list[str]) -> None:
    """Do what the arguments say; does not return."""
    end = arguments.index("--")
    parent, options = int(arguments[0]), arguments[1:end]
    directory, program = arguments[end + 1], arguments[end + 2 :]
    try:
        _enter_namespaces(rootless="--rootless" in options)
        _place(directory, read_only="--read-only" in options)
        for option in options:
            if option.startswith("--hide="):
                _hide(option.removeprefix("--hide="))
        _die_with_parent(parent)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        os.execv(program[0], program)
    except OSError as error:
        sys.stderr.write(f"cannot share {directory}: {error.strerror}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
