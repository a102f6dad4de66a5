"""``scripts/lab``: the command line, and the run from files to exit status."""

import argparse
import compileall
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from labkit import image, kernel, qemu, session, state
from labkit.cpio import CpioWriter
from labkit.paths import DEFAULT_KERNEL, KERNELS, PROJECT, VENV, LabError

EXIT_TIMEOUT, EXIT_LAB = 124, 125
#: Up to here a path travels in the tree archive, to memory; above, as a cached disk image.
_ARCHIVE_LIMIT = 64 * 2**20
#: A lab that shares two busy cores has been seen to need 15 s to boot, 4 s to resume.
_UP_WITHIN_S = 120.0
_RESUMED_WITHIN_S = 40.0
_KILL_WITHIN_S = 15.0
_SKIPPED_NAMES = frozenset((
    ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis",
    ".import_linter_cache", "build", "lab-out",
))  # fmt: skip
_PASSED_ENVIRONMENT = ("CI", "TERM", "LANG", "HOME", "USER", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
_PASSED_PREFIXES = ("KVMLITE_", "PYTEST_", "PYTHON", "LC_", "XDG_")
_WITHHELD = frozenset(("PYTHONPATH", "PYTHONHOME", "XDG_RUNTIME_DIR", "XDG_SESSION_ID"))

_EPILOG = """\
The project tree as it is now, and every --with PATH, are there at the same paths; what is
written to them is discarded. What CMD leaves under $LAB_OUT (default: lab-out in the project)
comes back. Without CMD: a shell.

exit status: that of CMD; 124 timeout; 125 the lab did not come up or was lost;
126, 127 CMD could not be started.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where the lab's files come from."""

    archived: list[Path]
    imaged: list[Path]


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line; what follows the options is CMD."""
    parser = argparse.ArgumentParser(
        prog="scripts/lab",
        description="Run CMD inside an emulated AMD-V host with a real /dev/kvm.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cpus", type=int, default=state.DEFAULT_CPUS, metavar="N",
        help=f"virtual CPUs, up to {qemu.CPUS_MAX} (default: 2)")  # fmt: skip
    add("--memory", default=state.DEFAULT_MEMORY, metavar="SIZE", help="memory (default: 4G)")
    add("--kernel", default=DEFAULT_KERNEL, metavar="PKG_OR_PATH",
        help="kernel the lab itself runs: a package that scripts/setup kernels got, its unpacked "
        f"directory, or a vmlinuz with modules beside it (default: {DEFAULT_KERNEL})")  # fmt: skip
    add("--with", dest="paths", action="append", default=[], type=Path, metavar="PATH",
        help="take this file or directory along; may be repeated")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable for CMD")
    add("--timeout", type=float, default=1800.0, metavar="S",
        help="end CMD after S seconds, with exit status 124 (default: 1800)")  # fmt: skip
    add("--cold", action="store_true", help="boot a machine instead of resuming a saved one")
    add("-v", "--verbose", action="store_true", help="show the machine's console; with --cold, all of its boot")
    add("command", nargs=argparse.REMAINDER, metavar="CMD…", help="default: a shell")
    arguments = parser.parse_args(words)
    if not 1 <= arguments.cpus <= qemu.CPUS_MAX:
        parser.error(f"--cpus {arguments.cpus}: 1 to {qemu.CPUS_MAX} expected")
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    arguments.command = arguments.command or ["/bin/bash", "-i"]
    return arguments


def choose_files(paths: list[Path]) -> Files:
    """Decide how each path travels: small ones in the archive, large ones as a disk."""
    archived: list[Path] = [PROJECT]
    imaged: list[Path] = []
    for path in dict.fromkeys(Path(os.path.abspath(path)) for path in paths):
        if path.is_relative_to(PROJECT) and not _SKIPPED_NAMES & set(path.relative_to(PROJECT).parts):
            continue
        if not path.exists():
            raise LabError(f"--with {path}: no such file or directory")
        is_small = not path.is_dir() or image.survey(path).size <= _ARCHIVE_LIMIT
        (archived if is_small else imaged).append(path)
    return Files(archived=archived, imaged=imaged)


def write_tree(paths: list[Path], skip: frozenset[str]) -> int:
    """Write the archive of this run's files; return a descriptor for its disk, without a name."""
    descriptor = os.memfd_create("tree")
    with open(descriptor, "wb", closefd=False) as file:
        archive = CpioWriter(file)
        for path in paths:
            archive.add_tree(path, str(path)[1:], skip if path == PROJECT else frozenset())
        archive.close()
    os.ftruncate(descriptor, qemu.SLOT_SIZE)
    return descriptor


def environment(extra: list[str], out: Path) -> dict[str, str]:
    """What CMD sees: a fixed base, the caller's variables that concern it, ``--env``."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name not in _WITHHELD and (name in _PASSED_ENVIRONMENT or name.startswith(_PASSED_PREFIXES))
    }
    result = {"HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"} | passed
    result |= {
        "PATH": f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "KVMLITE_LAB": "1",
        "KVMLITE_TEST_KERNELS": str(KERNELS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LAB_OUT": str(out),
    }
    for assignment in extra:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise LabError(f"--env {assignment}: NAME=VALUE expected")
        result[name] = value
    return result


def prepare(kernel_name: str) -> None:
    """See to it that everything cached is there; the first time that takes minutes."""
    needed = [image.base_image(), VENV / ".kvmlite-ready"]
    if "/" not in kernel_name:
        needed.append(KERNELS / kernel_name)
    if all(path.exists() for path in needed) and shutil.which("qemu-system-x86_64"):
        return
    command = [str(PROJECT / "scripts" / "setup"), "lab"]
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
        raise LabError("scripts/setup lab failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that one run is made of."""

    spec: qemu.MachineSpec
    request: session.Request
    disks: dict[str, Path]
    tree: int


def assemble(arguments: argparse.Namespace) -> Run:
    """Gather the files and images of a run, making those that are not there yet."""
    own_kernel = kernel.find(arguments.kernel)
    files = choose_files(arguments.paths)
    out = Path(os.path.abspath(os.environ.get("LAB_OUT") or PROJECT / "lab-out"))
    disks = {"root": image.base_image()}
    mounts: list[tuple[str, Path, bool]] = []

    def add_disk(slot: str, place: Path, path: Path, read_only: bool) -> None:
        if slot not in qemu.SLOTS:
            raise LabError(f"{place}: too many large paths and kernels; the lab has no {slot}")
        os.truncate(path, qemu.SLOT_SIZE)  # sparse; the file system inside stays as it is
        disks[slot] = path
        mounts.append((slot, place, read_only))

    venv = image.venv_image()
    if venv:
        add_disk("venv", VENV, venv, True)
    for number, package in enumerate(sorted(KERNELS.glob("linux-*"))):
        add_disk(f"kernel{number}", package, image.kernel_image(package), True)
    for number, path in enumerate(files.imaged):
        add_disk(f"with{number}", path, image.directory_image(path, "with", 1024), False)

    here = Path.cwd()
    reachable = any(here.is_relative_to(path) for path in [*files.archived, *files.imaged])
    request = session.Request(
        command=arguments.command,
        environment=environment(arguments.env, out),
        directory=here if reachable else PROJECT,
        mounts=mounts,
        binds=files.archived,
        links=[(own_kernel.modules, f"/lib/modules/{own_kernel.version}")],
        out=out,
        has_terminal=os.isatty(0) and os.isatty(1),
    )
    spec = state.machine_spec(own_kernel, cpus=arguments.cpus, memory=arguments.memory)
    if arguments.cold and arguments.verbose:
        spec = replace(spec, verbose=True)
    tree = write_tree(files.archived, _SKIPPED_NAMES | {str(out)})
    return Run(spec=spec, request=request, disks=disks, tree=tree)


def run(arguments: argparse.Namespace, console: int) -> int:
    """Bring up a lab, run the command in it, and return its exit status."""
    prepare(arguments.kernel)
    compile_sources()
    parts = assemble(arguments)
    if not arguments.cold:
        saved = state.saved_state(parts.spec, parts.disks["root"], console)
        try:
            return visit(parts, arguments.timeout, console, saved)
        except NotUp as failure:
            # a machine that was saved may not fit any more, for a reason its name does not show
            print(f"lab: a saved machine could not be resumed ({failure}); booting", file=sys.stderr)
            saved.unlink(missing_ok=True)
    return visit(parts, arguments.timeout, console, None)


class NotUp(session.LostLab):
    """The command was not even started."""


def visit(parts: Run, timeout: float, console: int, saved: Path | None) -> int:
    """Run the command in one machine, resumed from ``saved`` or booted."""
    with ExitStack() as stack:
        resumed = None
        if saved:
            try:
                resumed = stack.enter_context(open(saved, "rb")).fileno()
            except FileNotFoundError as error:
                raise NotUp("another lab has just removed it") from error
        disks = {slot: os.fspath(path) for slot, path in parts.disks.items()}
        ports = session.Ports(parts.spec.cpus)
        machine = qemu.start(
            parts.spec,
            qemu.Attachments(
                ports=ports.fds(),
                disks=disks | {"tree": f"/proc/self/fd/{parts.tree}"},
                state=resumed,
                inherited=(parts.tree,),
            ),
            console,
        )
        stack.callback(machine.wait)
        stack.callback(machine.kill)
        ports.handed_over()
        ports.start_heartbeats()
        talk = session.Session(ports.ours, parts.request)
        within = _RESUMED_WITHIN_S if saved else _UP_WITHIN_S
        try:
            talk.wait_up(time.monotonic() + within)
        except (session.LostLab, session.OutOfTime) as error:
            raise NotUp(str(error)) from error
        return converse(talk, parts.request, timeout)


def converse(talk: session.Session, request: session.Request, timeout: float) -> int:
    """From "up" to the exit status, with the deadlines."""
    with session.raw_terminal(request.has_terminal):
        try:
            return talk.wait_exit(time.monotonic() + timeout)
        except session.OutOfTime:
            talk.kill()
        try:
            talk.wait_exit(time.monotonic() + _KILL_WITHIN_S)
        except (session.OutOfTime, session.LostLab):
            pass  # then what it wrote last, and $LAB_OUT, are lost
    print(f"lab: timeout after {timeout:g} s: {' '.join(request.command)}", file=sys.stderr)
    return EXIT_TIMEOUT


def compile_sources() -> None:
    """Compile the tree's Python here, where it is 20 times faster than in the lab."""
    if sys.version_info[:2] == (3, 11):
        for directory in (PROJECT / "src", PROJECT / "tests"):
            compileall.compile_dir(directory, quiet=2)


class Interrupted(Exception):
    """A signal asks this run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Interrupted(number)


def _show(console: int) -> None:
    while data := os.read(console, 4096):
        os.write(2, data)


def main() -> int:
    """Run ``scripts/lab``; return its exit status."""
    arguments = parse_arguments(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if arguments.verbose:
        shown, console = os.pipe()
        threading.Thread(target=_show, args=(shown,), daemon=True).start()
    else:
        console = os.memfd_create("console")
    try:
        return run(arguments, console)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
    except (session.LostLab, session.OutOfTime) as error:
        print(f"lab: lost: {error}", file=sys.stderr)
        if not arguments.verbose:
            size = os.fstat(console).st_size
            tail = os.pread(console, 4096, max(0, size - 4096)).decode(errors="replace")
            print(f"lab: the end of its console:\n{tail.strip()}", file=sys.stderr)
    except Interrupted as interrupt:
        return 128 + interrupt.number
    return EXIT_LAB


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads may still wait on ports that nobody will write to any more
