"""virtio-fs: a directory of the host in the guest, served by virtiofsd (VIRTIO 1.2, 5.11)."""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from kvmlite.devices.vhost_user import VhostUserDevice
    from kvmlite.host.daemon import Daemon
    from kvmlite.virtio.device import DeviceResources
    from kvmlite.virtio.queue import DescriptorChain

CACHE_MODES = ("auto", "always", "none")

QUEUE_SIZE = 1024
_QUEUES = 2  # urgent requests, all others: QEMU's virtiofsd has no more

_RUST_PROGRAMS = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "virtiofsd")
_QEMU_PROGRAM = "/usr/lib/qemu/virtiofsd"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedDirectory:
    """A directory of the host, for ``mount -t virtiofs TAG`` in the guest.

    Attributes:
        path: The directory.
        tag: Its name in the guest, at most 36 bytes of UTF-8.
        read_only: The host lets no write through, whatever the guest's kernel is made to ask for. Else the guest's root may
            do everything below the directory that the user of this process may.
        cache: ``auto`` (the guest looks again after a second), ``always`` (for directories nobody else changes), ``none``.
        xattr: Extended attributes.
        hidden: Names in it that the guest finds as empty directories.
        submounts: Whether the guest sees other file systems below it as mounts of their own; an overlay cannot look into
            those. Without, they are part of the one file system, and two files may have the same inode number.
    """

    path: str | os.PathLike[str]
    tag: str
    read_only: bool = True
    cache: str = "auto"
    xattr: bool = False
    hidden: tuple[str, ...] = ()
    submounts: bool = False

    needs_shared_memory = True

    def __post_init__(self) -> None:
        from kvmlite.abi.virtio_fs import VIRTIO_FS_TAG_SIZE

        if not 0 < len(os.fsencode(self.tag)) <= VIRTIO_FS_TAG_SIZE or "\x00" in self.tag:
            raise ConfigError(f"tag {self.tag!r} of a shared directory has not 1 to {VIRTIO_FS_TAG_SIZE} bytes")
        if self.cache not in CACHE_MODES:
            raise ConfigError(f"unknown cache mode {self.cache!r}; choose one of {', '.join(CACHE_MODES)}")
        for name in self.hidden:
            if not name or name.startswith("/") or ".." in name.split("/"):
                raise ConfigError(f"{name!r} is no name inside a shared directory")

    def attach(self, resources: DeviceResources) -> VhostUserDevice:
        """Start virtiofsd and make the device.

        Raises:
            ConfigError: The path is not a directory, or guest memory cannot be shared.
            HostError: virtiofsd is not installed, or refuses.
        """
        from kvmlite.abi.virtio import VIRTIO_ID_FS
        from kvmlite.abi.virtio_fs import VIRTIO_FS_CONFIG
        from kvmlite.devices.vhost_user import VhostUserDevice

        path = os.path.realpath(self.path)
        if not os.path.exists(path):
            raise ConfigError(f"{os.fspath(self.path)}: no such directory", hint="make it, or check its name")
        if not os.path.isdir(path):
            raise ConfigError(f"{os.fspath(self.path)} is not a directory", hint="a file is shared with its directory")
        return VhostUserDevice(
            resources,
            lambda: start_virtiofsd(self, path),
            device_id=VIRTIO_ID_FS,
            queue_sizes=(QUEUE_SIZE,) * _QUEUES,
            features=0,
            config=VIRTIO_FS_CONFIG.pack(os.fsencode(self.tag), _QUEUES - 1),
            fail=fail_request,
            lost_with_it="what it knew of the guest's open files is lost with it",
            in_order=True,
        )


def start_virtiofsd(spec: SharedDirectory, path: str) -> tuple[Daemon, socket.socket]:
    """Start a virtiofsd that sees the directory and little else; it ends when its connection does.

    Raises:
        HostError: It is not installed, or cannot run as this user.
    """
    import sys

    from kvmlite.host import confine
    from kvmlite.host.daemon import Daemon, find_program
    from kvmlite.virtio.vhost_user.listener import connected_listener

    program = find_program(*_RUST_PROGRAMS, _QEMU_PROGRAM, package="qemu-system-common")
    is_rust, rootless = _is_rust(program), os.geteuid() != 0
    if rootless and not is_rust and confine.subordinate_ids() is None:
        raise HostError(
            "sharing a directory without being root takes subordinate user ids, and there are none for you",
            hint="apt-get install uidmap, and see to a range for you in /etc/subuid and /etc/subgid (usermod -v, -w)",
        )
    listener, client = connected_listener()
    try:
        with listener:
            argv = [
                sys.executable or "python3", "-I", "-S", confine.__file__, str(os.getpid()),
                *confine_options(spec, rootless=rootless), "--", path, program,
                *virtiofsd_options(spec, listener.fileno(), is_rust=is_rust, rootless=rootless),
            ]  # fmt: skip
            return Daemon("virtiofsd", argv, pass_fds=(listener.fileno(),)), client
    except BaseException:
        client.close()
        raise


def confine_options(spec: SharedDirectory, *, rootless: bool) -> list[str]:
    """Return what ``host/confine.py`` is told."""
    options = ["--rootless"] if rootless else []
    if spec.read_only:
        options.append("--read-only")
    return options + [f"--hide={name}" for name in spec.hidden]


def virtiofsd_options(spec: SharedDirectory, fd: int, *, is_rust: bool, rootless: bool) -> list[str]:
    """Return the options of virtiofsd, in either of its two languages. No path of the user's is among them."""
    from kvmlite.host.confine import PLACE

    if is_rust:
        options = [f"--fd={fd}", f"--shared-dir={PLACE}", "--log-level=warn", "--sandbox=namespace"]
        options.append(f"--cache={'never' if spec.cache == 'none' else spec.cache}")
        options += ["--xattr"] if spec.xattr else []
        options += ["--announce-submounts"] if spec.submounts else []
    else:
        words = [f"source={PLACE}", "sandbox=namespace", "log_level=warn", f"cache={spec.cache}"]
        words.append("xattr" if spec.xattr else "no_xattr")
        words += ["announce_submounts"] if spec.submounts else []
        options = ["-f", f"--fd={fd}", "-o", ",".join(words)]
    return options + (["--rlimit-nofile=0"] if rootless else [])


def _is_rust(program: str) -> bool:
    """QEMU's says ``virtiofsd version 7.2.22``, the other one ``virtiofsd 1.10.1``."""
    import subprocess

    if os.path.realpath(program) == _QEMU_PROGRAM:
        return False
    try:
        command = [program, "--version"]
        said = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"cannot ask {program} for its version: {error}") from error
    return not said.startswith("virtiofsd version")


def fail_request(chain: DescriptorChain) -> int:
    """Answer a FUSE request with ENOTCONN; a request without room for an answer needs none."""
    import errno

    from kvmlite.abi.virtio_fs import FUSE_IN_HEADER, FUSE_OUT_HEADER

    header = chain.read(0, FUSE_IN_HEADER.size)
    if len(header) < FUSE_IN_HEADER.size or chain.writable_size < FUSE_OUT_HEADER.size:
        return 0
    unique = FUSE_IN_HEADER.unpack(header)[2]
    return chain.write(FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size, -errno.ENOTCONN, unique))
