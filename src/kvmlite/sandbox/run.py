"""``kvmlite.run``: one command in a fresh guest."""

from __future__ import annotations

import time

from kvmlite.errors import BootError, ConfigError
from kvmlite.machine.outcome import Exited, TimedOut
from kvmlite.sandbox.linux_guest import GuestConfig, GuestEndedEarly, LinuxGuest
from kvmlite.sandbox.parts import in_order
from kvmlite.sandbox.result import Result
from kvmlite.sandbox.root_disk import OWN_KERNEL, open_root
from kvmlite.sandbox.volume_mount import open_volume

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from kvmlite.devices.blk import Disk
    from kvmlite.devices.vhost_user_blk import FormattedDisk
    from kvmlite.guest.execution import ExecHandle
    from kvmlite.sandbox.mounts import Mount
    from kvmlite.sandbox.network import Network
    from kvmlite.sandbox.parts import GuestPart


def parse_memory(memory: str | int) -> int:
    """MiB from ``"256M"``, ``"1G"`` or a number of bytes."""
    if isinstance(memory, int):
        return memory >> 20
    from kvmlite.sizes import parse_memory_mib

    return parse_memory_mib(memory, "memory")


def _network_parts(
    network: str | Network, publish: Sequence[str], allow: Sequence[str] | None
) -> tuple[GuestPart, ...]:
    if not isinstance(network, str):
        if publish or allow is not None:
            raise ConfigError("publish and allow belong to the Network that is given")
        return (network,)
    if network == "none":
        if publish or allow is not None:
            raise ConfigError("publish and allow need a network", hint='network="user" works without root')
        return ()
    from kvmlite.sandbox.network import Network

    return (Network(network, publish=publish, allow=allow),)


def run(
    command: str | Sequence[str],
    *,
    image: str = "",
    keep: str = "",
    dax: bool = False,
    kernel: str | os.PathLike[str] | None = None,
    memory: str | int = "256M",
    cpus: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    user: str = "",
    stdin: bytes | None = None,
    timeout: float | None = None,
    append: Sequence[str] = (),
    disks: Sequence[Disk | FormattedDisk] = (),
    mounts: Sequence[Mount] = (),
    volumes: Mapping[str, str] | None = None,
    network: str | Network = "none",
    publish: Sequence[str] = (),
    allow: Sequence[str] | None = None,
) -> Result:
    """Boot a microVM, run a command in it, and give all of it back.

    Args:
        command: A list is a program and its arguments; a string goes to ``/bin/sh -c``. With an image it is run by the
            image's entrypoint, if that has one.
        image: Name of an image in the store, or path of a raw disk image: the root file system; without, the guest has
            busybox.
        keep: A volume in which to keep what is written to the image's files; else it is thrown away.
        dax: Give the image to the guest as memory rather than as a disk (virtio-pmem).
        kernel: Name in the kernel store, or a path; ``"image"`` for the one that the image itself would boot; None for the
            default kernel.
        memory: RAM: ``"256M"``, ``"1G"``, or bytes.
        cpus: vCPUs.
        env: Environment of the command, over the image's.
        cwd, user: Where and as whom it runs; what the image says, else the root directory and root.
        stdin: Its input; None for none.
        timeout: Seconds for all of it, the boot included.
        append: Added to the kernel's command line.
        disks: Its disks, in this order: ``/dev/vda``, ``/dev/vdb`` ...
        mounts: Directories of the host in it.
        volumes: Volumes of the store, by name, and where each is mounted.
        network: ``"none"``, or what ``Network`` takes: ``"user"``, ``"nat"``, ``"bridge=br0"`` ...; or a ``Network``.
        publish: Ports of the host that lead to the guest: ``"8080:80"``.
        allow: All the guest may reach: ``"10.0.0.0/8"``, ``"example.org:443"``; None for everything.

    Returns:
        A ``Result``, whatever became of the guest: ask ``.ok`` or call ``.check()``.

    Raises:
        BootError: The guest did not come up.
        ConfigError, ImageError, HostError, UnsupportedError: The request, a file or the host is at fault.
        ExecFailed: The command cannot be run in the guest.

    Thread: any, several at once. Blocks.
    """
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    deadline = None if timeout is None else time.monotonic() + timeout
    parts: tuple[GuestPart, ...] = ()
    if keep and not image:
        raise ConfigError(f"keep={keep!r} is for an image, and none was named")
    if dax and not image:
        raise ConfigError("dax is for an image, and none was named")
    if image:
        root, wishes = open_root(image, keep=keep, dax=dax)
        parts, argv, env = (root,), wishes.argv(argv), {**wishes.environment(), **(env or {})}
        cwd, user = cwd or wishes.workdir, user or wishes.user
        if kernel == OWN_KERNEL:
            own = root.own_kernel()
            kernel, append = own.directory, (*own.arguments, *append)
    disks_of_store = [open_volume(volume, target) for volume, target in (volumes or {}).items()]
    config = GuestConfig(
        kernel=kernel,
        memory_mib=parse_memory(memory),
        vcpu_count=cpus,
        append=tuple(append),
        devices=tuple(disks),
        features=("blk",) if disks else (),
        parts=(*parts, *in_order((*disks_of_store, *mounts)), *_network_parts(network, publish, allow)),
    )
    name = command if isinstance(command, str) else " ".join(argv)
    with LinuxGuest(config) as guest:
        guest.start()
        handle: ExecHandle | None = None
        try:
            guest.wait_agent(timeout)
            handle = guest.exec(argv, env=env, cwd=cwd, user=user, stdin=stdin)
            report = guest.run_to_end(handle, deadline, timeout or 0.0)
        except GuestEndedEarly as error:
            if isinstance(error.report.outcome, Exited):
                raise
            report = error.report
        except BootError:
            if deadline is None or time.monotonic() < deadline:
                raise
            guest.machine.end(TimedOut(limit_s=timeout or 0.0))
            report = guest.machine.wait()
        return Result(
            command=name,
            outcome=report.outcome,
            stdout_bytes=handle.stdout if handle else b"",
            stderr_bytes=handle.stderr if handle else b"",
            report=report,
        )
