"""``kvmlite run``: options, the bare path, and what each end means as an exit code."""

from __future__ import annotations

import os
import time

from kvmlite.cli.main import EXIT_BROKEN_PIPE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TIMEOUT, report_error
from kvmlite.cli.options import FLAG, MANY, Option
from kvmlite.errors import ConfigError
from kvmlite.sizes import parse_count, parse_memory_mib, parse_seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.cli.options import Values
    from kvmlite.kvm.prepared import PreparedVm
    from kvmlite.machine.config import DeviceSpec
    from kvmlite.machine.machine import Machine
    from kvmlite.machine.outcome import ExitReport, Outcome

OPTIONS = (
    Option(
        "--kernel",
        "-k",
        metavar="KERNEL",
        help="Name in the store, path of a bzImage, vmlinux or bare guest, or image: what IMAGE itself boots.",
    ),
    Option("--memory", "-m", metavar="SIZE", default="256M", help="RAM: 256M, 1G. Default 256M."),
    Option("--cpus", "-c", metavar="N", default="1", help="vCPUs. Default 1."),
    Option("--append", "-a", kind=MANY, metavar="TEXT", help="Add to the kernel's command line."),
    Option("--initrd", metavar="FILE", help="Archive that the kernel unpacks over ours; the only one with --bare."),
    Option(
        "--env", "-e", kind=MANY, metavar="NAME[=VALUE]", help="Environment of the command; NAME alone passes ours on."
    ),
    Option("--workdir", "-w", metavar="DIR", help="Working directory of the command."),
    Option("--user", "-u", metavar="USER[:GROUP]", help="User of the command, by name or number. Default root."),
    Option("--entrypoint", metavar="PROGRAM", help="Run PROGRAM with CMD as its arguments, not IMAGE's entrypoint."),
    Option("--keep", metavar="VOLUME", help="Keep what is written to IMAGE's files in VOLUME, made of IMAGE at first."),
    Option("--dax", kind=FLAG, help="Give IMAGE to the guest as memory rather than as a disk (virtio-pmem)."),
    Option(
        "--timeout", "-t", metavar="TIME", help="End it after so long, the boot included: 30, 90s, 5m. Exit code 124."
    ),
    Option(
        "--boot-timeout", metavar="TIME", default="120", help="How long the guest may take to come up. Default 120 s."
    ),
    Option(
        "--hang-timeout", metavar="TIME", default="30", help="How long it may leave us without an answer. Default 30 s."
    ),
    Option("--console", kind=FLAG, help="Show the guest's console on stderr."),
    Option("--bare", kind=FLAG, help="Boot a guest as it is: serial port on stdout, no agent, no command."),
    Option("--protocol", metavar="NAME", default="auto", help="Boot protocol: auto, linux, pvh or multiboot."),
    Option("--no-unpack", kind=FLAG, help="Let a bzImage unpack itself in the guest (slower, keeps KASLR)."),
    Option(
        "--no-acpi", kind=FLAG, help="No ACPI: an 8254 and an 8259, one vCPU, devices on the kernel's command line."
    ),
    Option(
        "--channel",
        metavar="NAME",
        default="auto",
        help="How to reach the agent: auto, vsock, console, serial, vhost-vsock.",
    ),
    Option(
        "--memory-backing",
        metavar="NAME",
        default="anonymous",
        help="What guest RAM is made of: anonymous, memfd or hugepages.",
    ),
    Option(
        "--disk",
        kind=MANY,
        metavar="PATH[,ro][,...]",
        help="A raw image or block device as a disk; ,ro ,direct ,overlay ,serial=TEXT ,iops=N ,bandwidth=SIZE ...",
    ),
    Option(
        "--volume",
        "-v",
        kind=MANY,
        metavar="NAME:DST[:ro]",
        help="A volume with a file system at DST; see kvmlite volume.",
    ),
    Option(
        "--mount",
        kind=MANY,
        metavar="SRC:DST[:MODE]",
        help="A directory of the host in the guest: :ro (default, kept by the host), :rw, or :overlay (writes are lost).",
    ),
    Option("--root", metavar="host|DIR", help="Boot into the host's files, or DIR's: nothing is changed there."),
    Option("--balloon", kind=FLAG, help="Give memory that the guest frees back to the host."),
    Option(
        "--net",
        metavar="MODE",
        default="none",
        help="Network: none, user (no root needed), nat, bridge=NAME[,vlan=N][,address=CIDR], tap=NAME, fd=N. Default none.",
    ),
    Option(
        "--publish",
        kind=MANY,
        metavar="[ADDR:]HOST:GUEST[/udp]",
        help="Let a port of the host (its loopback, without ADDR) lead to one of the guest; with --net user or nat.",
    ),
    Option(
        "--allow",
        kind=MANY,
        metavar="CIDR|HOST[:PORT]",
        help="Let the guest reach this and what else is allowed, and nothing besides.",
    ),
    Option("--force", kind=FLAG, help="Try to boot a kernel even where this host's KVM cannot."),
    Option("--timings", kind=FLAG, help="Print when each stage was reached, on stderr."),
    Option("--explain-boot", kind=FLAG, help="Print what the boot time went to, on stderr."),
    Option("--json", kind=FLAG, help="Print the outcome as a JSON object on stderr at the end."),
)

HELP = """Run a command in a microVM: kvmlite run [IMAGE] -- CMD...

Boots a stock kernel with a small agent, runs CMD in it and passes on its input, output and exit code. Without CMD: what
IMAGE runs, or an interactive shell on a terminal. IMAGE is a root file system (see kvmlite image); without one, the guest
has busybox. What CMD writes is thrown away, unless --keep says where it goes. With --bare, boots any guest as it is.
"""

EPILOG = """Exit codes: the command's own; 101 the guest kernel panicked, 102 it never came up, 103 it hangs, 104 lost (no
status came), 105 triple fault, 106 reset, 107 powered off without a status (0 with --bare), 124 time limit, 125 kvmlite
could not, 126/127 the command cannot be run / was not found, 130 interrupted."""


def exit_code(outcome: Outcome, *, bare: bool) -> int:
    """The process's exit code for each way a guest can end."""
    from kvmlite.machine import outcome as kinds

    match outcome:
        case kinds.Exited(code=code):
            return code
        case kinds.PoweredOff():
            return 0 if bare else 107
        case kinds.Panicked():
            return 101
        case kinds.Hung():
            return 103
        case kinds.Lost():
            return 104
        case kinds.TripleFault():
            return 105
        case kinds.Reset():
            return 106
        case kinds.TimedOut():
            return EXIT_TIMEOUT
        case _:
            return EXIT_FAILED


def run(values: Values) -> int:
    """Run what the options ask for; the exit code."""
    if not values["bare"]:
        from kvmlite.cli.run_command import run_command

        return run_command(values)
    process_start = time.monotonic() - time.process_time()
    from kvmlite.kvm.prepared import PreparedVm

    prepared = PreparedVm()
    try:
        machine = _bare_machine(values, prepared)
    except BaseException:
        prepared.close()
        raise
    with machine:
        machine.spans["process start"] = process_start
        machine.mark("import")
        return _run_bare(machine, prepared, values)


def devices(values: Values) -> tuple[DeviceSpec, ...]:
    """The devices that options ask for."""
    if not values["disk"]:
        return balloons(values)
    from kvmlite.cli.disks import parse_disk

    return (*balloons(values), *(parse_disk(text) for text in values["disk"]))


def balloons(values: Values) -> tuple[DeviceSpec, ...]:
    """The balloon, if one is asked for."""
    if not values["balloon"]:
        return ()
    from kvmlite.devices.balloon import Balloon

    return (Balloon(),)


def cards(values: Values) -> tuple[DeviceSpec, ...]:
    """The network card of a bare guest, which has to find its address itself."""
    if values["net"] == "none" and not values["publish"] and not values["allow"]:
        return ()
    from kvmlite.cli.network import parse_network

    network = parse_network(values)
    return () if network is None else network.devices


def _bare_machine(values: Values, prepared: PreparedVm) -> Machine:
    from kvmlite.machine.config import Kernel, MachineConfig
    from kvmlite.machine.machine import Machine

    if not values["kernel"]:
        raise ConfigError("--bare needs a guest to boot", hint="name it with --kernel FILE")
    if values["command"]:
        raise ConfigError("--bare boots the guest as it is and takes no command", hint="drop --bare or the command")
    if values["image"]:
        raise ConfigError("--bare boots the guest as it is and takes no image", hint="drop --bare or the image")
    for option in ("env", "workdir", "user", "entrypoint", "keep", "dax"):
        if values[option]:
            raise ConfigError(f"--{option} means nothing with --bare: there is no agent to start a command")
    for option in ("mount", "volume", "root"):
        if values[option]:
            raise ConfigError(f"--{option} means nothing with --bare: there is no agent to mount anything")
    initrd = values["initrd"]
    config = MachineConfig(
        kernel=Kernel(
            path=values["kernel"],
            cmdline=" ".join(values["append"]),
            initrd=(initrd,) if initrd else (),
            protocol=values["protocol"],
            unpack=not values["no_unpack"],
        ),
        vcpu_count=parse_count(values["cpus"], "--cpus"),
        memory_mib=parse_memory_mib(values["memory"], "--memory"),
        memory_backing=values["memory_backing"],
        devices=(*devices(values), *cards(values)),
        acpi=not values["no_acpi"],
        console_fd=1,
        console_input_fd=0,
    )
    return Machine(config, prepared=prepared)


def _run_bare(machine: Machine, prepared: PreparedVm, values: Values) -> int:
    try:
        if os.isatty(0):
            from kvmlite.cli.terminal import GuestTerminal

            with GuestTerminal(0, raw=False):
                report = _run_to_end(machine, prepared, values)
        else:
            report = _run_to_end(machine, prepared, values)
    except KeyboardInterrupt:
        machine.stop("interrupted")
        machine.wait()
        report_error("interrupted")
        return EXIT_INTERRUPTED
    if report.console_error is not None:
        return _tell_broken_console(report, report.console_error, values)
    tell(report, values)
    return exit_code(report.outcome, bare=True)


def _run_to_end(machine: Machine, prepared: PreparedVm, values: Values) -> ExitReport:
    limit = parse_seconds(values["timeout"], "--timeout") if values["timeout"] else None
    machine.build()
    if not values["force"]:
        _refuse_linux_on_software_kvm(machine, prepared)
    machine.start()
    return wait_within(machine, limit)


def _tell_broken_console(report: ExitReport, error: OSError, values: Values) -> int:
    """Output was lost: an error whatever the guest's status, unless its reader had enough (``... | head -1``)."""
    import errno

    from kvmlite.machine.outcome import Stopped

    if error.errno != errno.EPIPE:
        report_error(f"cannot write the guest's console to standard output: {error.strerror}")
    tell(report, values, is_told=True)
    if error.errno != errno.EPIPE:
        return EXIT_FAILED
    return EXIT_BROKEN_PIPE if isinstance(report.outcome, Stopped) else exit_code(report.outcome, bare=True)


def _refuse_linux_on_software_kvm(machine: Machine, prepared: PreparedVm) -> None:
    if machine.boots_linux:
        from kvmlite.kvm.probe import refuse_software_kvm

        refuse_software_kvm(prepared.kvm)


def wait_within(machine: Machine, limit_s: float | None) -> ExitReport:
    """Wait for the machine's end, or end it when the limit has run out."""
    from kvmlite.machine.outcome import TimedOut

    try:
        return machine.wait(limit_s)
    except TimeoutError:
        assert limit_s is not None
        machine.end(TimedOut(limit_s=limit_s))
        return machine.wait()


def tell(report: ExitReport, values: Values, *, is_told: bool = False) -> None:
    """What the user asked to be told, and why it ended if that was not by itself."""
    from kvmlite.machine.outcome import Exited, PoweredOff, VmmError, describe

    outcome = report.outcome
    is_ordinary = isinstance(outcome, Exited) or (isinstance(outcome, PoweredOff) and values["bare"])
    if not is_told and not is_ordinary:
        report_error(describe(outcome), getattr(outcome.error, "hint", "") if isinstance(outcome, VmmError) else "")
    if values["timings"] or values["explain_boot"] or values["json"]:
        from kvmlite.cli.explain import explain

        explain(report, timings=values["timings"], boot=values["explain_boot"], as_json=values["json"])
