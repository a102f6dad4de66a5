"""What is wrong in the request: one line that names it and says what to do, exit code 125, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import ROOT, Command

from .conftest import RELEASE, bzimage

pytestmark = pytest.mark.kvm

AARCH64 = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 183, 1) + bytes(4096)


def make_directory(path: Path) -> None:
    path.mkdir()


def make(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


NO_KERNELS = {
    "missing": (lambda path: None, "cannot read the kernel: No such file or directory"),
    "empty": (make(b""), "is an empty file"),
    "text": (make(b"just a few words\n"), "is a text file, not a kernel"),
    "noise": (make(bytes(range(256)) * 64), "is not a kernel (starts with 00 01 02 03"),
    "truncated": (make(bzimage(1 << 20)[:100_000]), "truncated bzImage: its code ends at byte 1048576"),
    "truncated-header": (make(bzimage()[:600]), "truncated bzImage: 600 bytes"),
    "elf-header-only": (make(b"\x7fELF\x02\x01\x01" + bytes(9)), "truncated ELF"),
    "aarch64": (make(AARCH64), "is an ELF for AArch64; kvmlite runs x86-64 kernels"),
    "fifo": (os.mkfifo, "is a FIFO, not a kernel file"),
    "directory": (make_directory, "is a directory, not a kernel file"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_KERNELS)
def test_a_file_that_is_no_kernel_is_named_with_what_it_is(kvmlite: Command, tmp_path: Path, name: str) -> None:
    write, what = NO_KERNELS[name]
    path = tmp_path / name
    write(path)
    ended = kvmlite.here("run", "--bare", "--kernel", path)
    assert (ended.code, ended.stdout) == (125, b"")
    assert str(path) in ended.complaint
    assert what in ended.complaint


@pytest.mark.parametrize("name", NO_KERNELS)
def test_it_is_refused_in_the_same_way_for_a_command(kvmlite: Command, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    NO_KERNELS[name][0](path)
    ended = kvmlite.here("run", "--force", "--kernel", path, "--", "true")
    assert (ended.code, ended.stdout) == (125, b"")
    assert str(path) in ended.complaint


def test_dev_zero_is_no_kernel(kvmlite: Command) -> None:
    ended = kvmlite("run", "--bare", "--kernel", "/dev/zero")
    assert ended.code == 125
    assert ended.complaint == "/dev/zero: is a character device, not a kernel file"


@pytest.mark.root
def test_a_kernel_that_may_not_be_read_is_named(kvmlite: Command, tmp_path: Path, open_kvm: tuple[str, ...]) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    path.chmod(0)
    ended = kvmlite("run", "--bare", "--kernel", path, prefix=open_kvm)
    assert ended.code == 125
    assert ended.complaint == f"'{path}': cannot read the kernel: Permission denied; check the path and its permissions"


def test_an_initrd_larger_than_memory_says_how_much_is_needed(kvmlite: Command, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    with open(tmp_path / "initrd", "wb") as file:
        file.truncate(300 << 20)
    ended = kvmlite(
        "run", "--bare", "--force", "--no-unpack", "--kernel", tmp_path / "vmlinuz", "--initrd", tmp_path / "initrd"
    )  # fmt: skip
    assert ended.code == 125
    assert f"initrd {tmp_path}/initrd of 300 MiB does not fit" in ended.complaint
    assert ended.complaint.endswith("give the guest more memory: --memory 512M")


BAD_AMOUNTS = {
    ("--memory", "1M"): "1 MiB of memory asked for; a machine has 2 to 4194304 MiB",
    ("--memory", "0"): "--memory '0' is not an amount of memory; write a number with a unit: 256M, 1G",
    ("--memory", "0M"): "0 MiB of memory asked for; a machine has 2 to",
    ("--memory", "-5M"): "--memory '-5M' is not an amount of memory",
    ("--memory", "plenty"): "--memory 'plenty' is not an amount of memory",
    ("--memory", "nanG"): "--memory 'nanG' is not an amount of memory",
    ("--memory", "99999999T"): "a machine has 2 to 4194304 MiB",
    ("--memory", ""): "--memory is empty",
    ("--cpus", "0"): "0 vCPUs asked for; a machine has 1 to 255",
    ("--cpus", "4096"): "4096 vCPUs asked for; a machine has 1 to 255",
    ("--cpus", "-1"): "-1 vCPUs asked for; a machine has 1 to 255",
    ("--cpus", "1.5"): "--cpus '1.5' is not a whole number",
    ("--cpus", "many"): "--cpus 'many' is not a whole number",
    ("--timeout", "0"): "--timeout '0' is not a time; write seconds, or 90s, 5m, 1h",
    ("--timeout", "-1"): "--timeout '-1' is not a time",
    ("--timeout", "soon"): "--timeout 'soon' is not a time",
    ("--timeout", "inf"): "--timeout 'inf' is not a time",
    ("--timeout", ""): "--timeout is empty",
    ("--kernel", ""): "--kernel is empty",
    ("--protocol", "efi"): "unknown boot protocol 'efi'; choose one of auto, linux, pvh, multiboot",
    ("--memory-backing", "disk"): "unknown memory backing 'disk'; choose one of anonymous, memfd, hugepages",
}


@pytest.mark.parametrize(("option", "value"), BAD_AMOUNTS)
def test_a_value_out_of_range_is_named_with_the_range(
    kvmlite: Command, loop_for_ever: Path, option: str, value: str
) -> None:
    ended = kvmlite.here("run", "--bare", "--kernel", loop_for_ever, option, value)
    assert (ended.code, ended.stdout) == (125, b"")
    assert BAD_AMOUNTS[option, value] in ended.complaint


USAGE = {
    ("rnu",): "no such command: rnu; did you mean run?",
    ("xyzzy",): "no such command: xyzzy; there are: run, kernel, ",
    ("kernel", "lst"): "No such command 'lst'. Did you mean 'ls'?; see kvmlite kernel --help",
    ("run", "--memry", "5"): "--memory",
    ("run", "--bear"): "'--bare'",
    ("run", "--memory"): "Option '--memory' requires an argument; see kvmlite run --help",
    ("run", "--force"): "no command to run; put it behind --: kvmlite run -- uname -a",
    ("run", "--bare"): "--bare needs a guest to boot; name it with --kernel FILE",
    ("run", "--bare", "--kernel", "x", "--", "true"): "drop --bare or the command",
    ("run", "--bare", "--kernel", "x", "--user", "me"): "--user means nothing with --bare",
    ("run", "--force", "--env", "=1", "--", "true"): "--env '=1' names no variable; write --env NAME=VALUE",
    ("run", "--force", "--channel", "tin-can", "--", "true"): "unknown channel 'tin-can'; choose auto, vsock, console",
    ("run", "--bare", "--kernel", "x", "--disk", "x,bandwidth=9"): "--disk bandwidth '9' is less than 512 bytes",
    ("kernel", "show", "6.1-clod"): "the store is empty: kvmlite kernel add",
    ("run", "--force", "--kernel", "nosuch", "--", "true"): "no kernel 'nosuch' in the store",
}


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_a_mistake_in_the_command_line_is_answered_with_what_would_be_right(
    kvmlite: Command, arguments: tuple[str, ...]
) -> None:
    ended = kvmlite.here(*arguments)
    assert (ended.code, ended.stdout) == (125, b"")
    assert USAGE[arguments] in ended.complaint


def test_the_name_of_a_kernel_is_suggested(kvmlite: Command, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    assert kvmlite("kernel", "add", "-q", tmp_path / "vmlinuz").code == 0
    ended = kvmlite("run", "--force", "--kernel", RELEASE.replace("cloud", "clod"), "--", "true")
    assert ended.code == 125
    assert ended.complaint.endswith(f"did you mean {RELEASE}?")


def test_without_a_readable_dev_kvm_it_says_how_to_get_at_it(kvmlite: Command, loop_for_ever: Path) -> None:
    ended = kvmlite("run", "--bare", "--kernel", loop_for_ever, prefix=in_namespace(DENY_KVM))
    assert ended.code == 125
    assert ended.complaint.startswith("cannot open /dev/kvm: Permission denied; ")
    assert "kvm" in ended.complaint.split("; ", 1)[1]


@pytest.mark.root
def test_a_dev_kvm_that_is_something_else_is_seen(kvmlite: Command, loop_for_ever: Path) -> None:
    ended = kvmlite("run", "--bare", "--kernel", loop_for_ever, prefix=in_namespace("mount --bind /dev/null /dev/kvm"))
    assert ended.code == 125
    assert ended.complaint.startswith("/dev/kvm is not KVM: ")


@pytest.mark.root
def test_a_host_without_dev_kvm_is_told_so(kvmlite: Command, loop_for_ever: Path) -> None:
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"
    ended = kvmlite("run", "--bare", "--kernel", loop_for_ever, prefix=in_namespace(hide))
    assert ended.code == 125
    assert ended.complaint.startswith("cannot open /dev/kvm: No such file or directory; ")


@pytest.mark.root
def test_a_full_disk_while_a_kernel_is_added_leaves_nothing(kvmlite: Command, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage(8 << 20))
    kvmlite.home.mkdir()
    script = (
        f"mount -t tmpfs -o size=2M none {kvmlite.home} && before=$(cd {kvmlite.home} && find . -type f -size +0) && "
        f'"$@"; code=$?; find {kvmlite.home} -type f -size +0 >&2; exit $code'
    )
    ended = kvmlite("kernel", "add", "-q", tmp_path / "vmlinuz", prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert ended.code == 125
    assert f"cannot add {tmp_path}/vmlinuz to {kvmlite.home}" in ended.complaint
    assert "No space left on device; free some space there, or set KVMLITE_HOME" in ended.complaint


def test_a_damaged_module_is_named(kvmlite: Command, kernel_package: Path) -> None:
    ended = kvmlite("run", "--force", "--kernel", kernel_package, "--", "true")
    assert ended.code == 125
    assert f"{kernel_package}/lib/modules/{RELEASE}/kernel/virtio_mmio.ko" in ended.complaint


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--mount", "a:/x", "--mount", "b:/x/"), "two mounts at /x: one would hide the other; give each a place"),
        (("--mount", "a:/"), "nothing can be mounted at / of a running guest; --root boots into a directory"),
        (("--mount", "a:/x,rw"), "the mode comes behind a colon, not a comma; write SRC:DST, then one of :ro"),
        (("--volume", "./a:/x"), "'./a' cannot name a volume; --mount shares a directory"),
        (("--root", "a"), "--root 'a' is unknown; write --root host, or for a directory --root ./a"),
        (("--net", "user", "--publish", "80:1", "--publish", "80:2"), "port 80 of the host leads to port 1 already"),
    ],
    ids=str,
)
def test_parts_of_a_guest_that_do_not_go_together_are_named(
    kvmlite: Command, kernel_package: Path, options: tuple[str, ...], complaint: str
) -> None:
    ended = kvmlite("run", "--force", "--kernel", kernel_package, *options, "--", "true")
    assert (ended.code, ended.stdout) == (125, b"")
    assert complaint in ended.complaint


def test_a_damaged_modules_dep_is_named(kvmlite: Command, kernel_package: Path) -> None:
    path = kernel_package / "lib/modules" / RELEASE / "modules.dep"
    path.write_bytes(b"\x00\xff\xfe no colon here\n" * 100)
    ended = kvmlite("run", "--force", "--kernel", kernel_package, "--", "true")
    assert ended.code == 125
    assert str(path) in ended.complaint


@pytest.mark.root
def test_a_missing_agent_is_named_with_how_to_build_it(kvmlite: Command, kernel_package: Path) -> None:
    hide = f"mount -t tmpfs none {ROOT}/src/kvmlite/guest/agent"
    ended = kvmlite("run", "--force", "--kernel", kernel_package, "--", "true", prefix=in_namespace(hide))
    assert ended.code == 125
    assert "kvmlite-agent: not built; run: python -m kvmlite.guest.build_agent" in ended.complaint


@pytest.mark.root
def test_a_missing_busybox_is_named_with_its_package(kvmlite: Command, kernel_package: Path) -> None:
    hide = "for f in /bin/busybox /usr/bin/busybox; do [ ! -e $f ] || mount --bind /dev/null $f; done; export PATH=/nonexistent"
    ended = kvmlite("run", "--force", "--kernel", kernel_package, "--", "true", prefix=in_namespace(hide))
    assert ended.code == 125
    assert ended.complaint == "no statically linked busybox on this host; apt install busybox-static"


@pytest.mark.root
def test_an_agent_that_is_no_program_is_named(kvmlite: Command, kernel_package: Path) -> None:
    shutil.rmtree(kernel_package / "lib")
    hide = f"mount --bind /etc/passwd {ROOT}/src/kvmlite/guest/agent/kvmlite-agent"
    ended = kvmlite("run", "--force", "--kernel", kernel_package, "--", "true", prefix=in_namespace(hide))
    assert ended.code == 125
    assert "kvmlite-agent is not " in ended.complaint


def test_a_mistake_of_ours_shows_itself_under_no_exit_code_of_a_guest(kvmlite: Command, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import kvmlite.cli.run\ndel kvmlite.cli.run.OPTIONS\n")
    ended = kvmlite("run", "--bare", "--kernel", "x", env={"PYTHONPATH": f"{tmp_path}:{ROOT}/src"})
    assert ended.code == 125
    assert "Traceback" in ended.stderr


# As another user, or in a mount namespace of its own: the machine itself is never touched.
DENY_KVM = "mount -t tmpfs none /mnt && mknod -m 600 /mnt/kvm c 10 232 && mount --bind /mnt/kvm /dev/kvm"
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def in_namespace(script: str) -> tuple[str, ...]:
    """Run ``script`` in a mount namespace, then the command; as nobody where the script is to deny it something."""
    run = f'exec {" ".join(AS_NOBODY)} "$@"' if script is DENY_KVM else 'exec "$@"'
    return ("unshare", "-m", "sh", "-c", f"{script}; {run}", "sh")


@pytest.fixture
def open_kvm() -> tuple[str, ...]:
    """Prefix: as nobody, with a /dev/kvm that anybody may open."""
    allow = "mount -t tmpfs none /mnt && mknod -m 666 /mnt/kvm c 10 232 && mount --bind /mnt/kvm /dev/kvm"
    return ("unshare", "-m", "sh", "-c", f'{allow}; exec {" ".join(AS_NOBODY)} "$@"', "sh")
