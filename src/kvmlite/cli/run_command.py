"""``kvmlite run -- CMD``: a command in a guest as if it ran here: streams, terminal, signals, exit code."""

from __future__ import annotations

import os
import signal
import time

from kvmlite.cli.main import EXIT_INTERRUPTED, EXIT_TIMEOUT, report_error
from kvmlite.cli.run import devices, exit_code, tell
from kvmlite.cli.terminal import GuestTerminal
from kvmlite.errors import BootError, ConfigError
from kvmlite.kvm.prepared import PreparedVm
from kvmlite.machine.outcome import TimedOut
from kvmlite.sizes import parse_count, parse_memory_mib, parse_seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmlite.cli.options import Values
    from kvmlite.guest.execution import ExecHandle
    from kvmlite.images.image import ImageConfig
    from kvmlite.machine.outcome import ExitReport
    from kvmlite.sandbox.linux_guest import LinuxGuest
    from kvmlite.sandbox.parts import GuestPart, PlacedPart
    from kvmlite.sandbox.root_disk import RootDisk

EXIT_BOOT = 102
INTERRUPT_GRACE_S = 5.0


def run_command(values: Values) -> int:
    """Run what the options ask for; the exit code."""
    process_start = time.monotonic() - time.process_time()
    limit = parse_seconds(values["timeout"], "--timeout") if values["timeout"] else None
    root, image_config = _root(values)
    argv, wants_tty = _command(values, image_config)
    environment = _environment(image_config, values["env"])
    prepared = PreparedVm()
    try:
        if not values["force"]:
            from kvmlite.kvm.probe import refuse_software_kvm

            refuse_software_kvm(prepared.kvm)
        guest = _make_guest(values, prepared, root)
    except BaseException:
        prepared.close()
        raise
    with guest:
        guest.machine.spans["process start"] = process_start
        guest.machine.call_on_warning(lambda text: report_error(f"warning: {text}"))
        values["workdir"] = values["workdir"] or image_config.workdir
        values["user"] = values["user"] or image_config.user
        return _Session(guest, values, argv, environment, wants_tty, limit).run()


def _root(values: Values) -> tuple[RootDisk | None, ImageConfig]:
    """The root disk, if an image was asked for, and how that wants to be run."""
    if not values["image"]:
        for option in ("entrypoint", "keep", "dax"):
            if values[option]:
                raise ConfigError(f"--{option} is for an image, and none was named", hint="kvmlite run IMAGE -- CMD")
        from kvmlite.images.image import ImageConfig

        return None, ImageConfig()
    from kvmlite.sandbox.root_disk import open_root

    try:
        return open_root(values["image"], keep=values["keep"], dax=values["dax"])
    except ConfigError as error:
        if not values["command"]:  # kvmlite run uname
            error.hint += f"; a command goes behind --: kvmlite run -- {values['image']}"
        raise


def _kernel(values: Values, root: RootDisk | None) -> tuple[str | None, tuple[str, ...]]:
    """Which kernel, and what is added to its command line."""
    from kvmlite.sandbox.root_disk import OWN_KERNEL

    given = tuple(values["append"])
    if values["kernel"] != OWN_KERNEL:
        return values["kernel"] or None, given
    if root is None:
        raise ConfigError(f"--kernel {OWN_KERNEL} is the one that an image holds, and none was named")
    own = root.own_kernel()
    return own.directory, (*own.arguments, *given)


def _command(values: Values, image: ImageConfig) -> tuple[list[str], bool]:
    """What to run, and whether on a terminal."""
    on_terminal = os.isatty(0) and os.isatty(1)
    entrypoint = [values["entrypoint"]] if values["entrypoint"] else None
    argv = image.argv(values["command"], entrypoint)
    if argv:
        return argv, on_terminal
    if not on_terminal:
        raise ConfigError("no command to run", hint="put it behind --: kvmlite run -- uname -a")
    return ["/bin/sh", "-l"], True


def _environment(image: ImageConfig, given: list[str]) -> dict[str, str]:
    """The image's environment, and over it what the user gives."""
    environment = image.environment()
    for entry in given:
        name, has_value, value = entry.partition("=")
        if not name:
            raise ConfigError(f"--env {entry!r} names no variable", hint="write --env NAME=VALUE")
        if has_value:
            environment[name] = value
        elif name in os.environ:
            environment[name] = os.environ[name]
    return environment


def _make_guest(values: Values, prepared: PreparedVm, root: RootDisk | None) -> LinuxGuest:
    from kvmlite.sandbox.linux_guest import GuestConfig, LinuxGuest

    imported = time.monotonic()
    kernel, append = _kernel(values, root)
    config = GuestConfig(
        kernel=kernel,
        memory_mib=parse_memory_mib(values["memory"], "--memory"),
        vcpu_count=parse_count(values["cpus"], "--cpus"),
        memory_backing=values["memory_backing"],
        devices=devices(values),
        features=(*(("balloon",) if values["balloon"] else ()), *(("blk",) if values["disk"] else ())),
        parts=_parts(values, root),
        acpi=not values["no_acpi"],
        append=append,
        initrd=(values["initrd"],) if values["initrd"] else (),
        channel=values["channel"],
        unpack=not values["no_unpack"],
        console_fd=2 if values["console"] else -1,
        boot_timeout_s=parse_seconds(values["boot_timeout"], "--boot-timeout"),
        hang_timeout_s=parse_seconds(values["hang_timeout"], "--hang-timeout"),
    )
    guest = LinuxGuest(config, prepared=prepared)
    guest.machine.spans["import"] = imported
    return guest


def _parts(values: Values, root_disk: RootDisk | None) -> tuple[GuestPart, ...]:
    """What the guest is given beside devices, in the order in which it is set up: the root before what is done in it."""
    from kvmlite.cli.network import parse_network
    from kvmlite.sandbox.parts import in_order

    root: tuple[GuestPart, ...] = (root_disk,) if root_disk is not None else ()
    mounts: list[PlacedPart] = []
    if values["root"] or values["mount"]:
        from kvmlite.cli.mounts import parse_mount, parse_root

        if values["root"]:
            if root:
                raise ConfigError("--root means nothing with an image, which is the root", hint="drop one of them")
            root = (parse_root(values["root"]),)
        mounts += [parse_mount(text) for text in values["mount"]]
    if values["volume"]:
        from kvmlite.cli.volume import parse_volume

        mounts += [parse_volume(text) for text in values["volume"]]
    network = parse_network(values)
    return (*root, *in_order(mounts), *(() if network is None else (network,)))


class _Session:
    """One command from the boot to its exit code."""

    def __init__(
        self,
        guest: LinuxGuest,
        values: Values,
        argv: list[str],
        environment: dict[str, str],
        wants_tty: bool,
        limit_s: float | None,
    ) -> None:
        self._guest = guest
        self._values = values
        self._argv = argv
        self._environment = environment
        self._wants_tty = wants_tty
        self._limit_s = limit_s
        self._deadline = None if limit_s is None else time.monotonic() + limit_s

    def run(self) -> int:
        from kvmlite.guest.agent import ExecFailed
        from kvmlite.sandbox.linux_guest import GuestEndedEarly

        try:
            self._guest.start()
            self._guest.wait_agent(self._limit_s and min(self._limit_s, self._guest.config.boot_timeout_s))
            report = self._run_in_guest()
        except ExecFailed as error:
            has_busybox = error.stage == "exec" and not (self._values["image"] or self._values["root"])
            report_error(error, "the guest has busybox; its commands are what it brings" if has_busybox else "")
            return error.exit_code
        except GuestEndedEarly as error:
            report_error(error, error.hint)
            tell(error.report, self._values, is_told=True)
            return exit_code(error.report.outcome, bare=False)
        except BootError as error:
            return self._not_up(error)
        except KeyboardInterrupt:
            report_error("interrupted")
            return EXIT_INTERRUPTED
        tell(report, self._values)
        return exit_code(report.outcome, bare=False)

    def _not_up(self, error: BootError) -> int:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._guest.machine.end(TimedOut(limit_s=self._limit_s or 0.0))
            tell(self._guest.machine.wait(), self._values)
            return EXIT_TIMEOUT
        report_error(error, error.hint)
        return EXIT_BOOT

    def _run_in_guest(self) -> ExitReport:
        values, terminal = self._values, GuestTerminal(0, raw=True) if self._wants_tty else None
        if terminal is not None:
            self._environment.setdefault("TERM", os.environ.get("TERM", "linux"))
        options: dict[str, Any] = {
            "env": self._environment, "cwd": values["workdir"], "user": values["user"],
            "stdin": 0, "stdout": 1, "stderr": 2,
        }  # fmt: skip
        if terminal is None:
            return self._wait(self._guest.exec(self._argv, **options))
        with terminal:
            handle = self._guest.exec(self._argv, tty=terminal.size(), **options)
            terminal.on_resize(handle.resize)
            return self._wait(handle)

    def _wait(self, handle: ExecHandle) -> ExitReport:
        """Wait for the command. The first Ctrl-C is the command's, the second ours."""
        try:
            return self._guest.run_to_end(handle, self._deadline, self._limit_s or 0.0)
        except KeyboardInterrupt:
            handle.signal(signal.SIGINT)
        grace = time.monotonic() + INTERRUPT_GRACE_S
        report = self._guest.run_to_end(handle, min(grace, self._deadline or grace))
        if isinstance(report.outcome, TimedOut):
            raise KeyboardInterrupt
        return report
