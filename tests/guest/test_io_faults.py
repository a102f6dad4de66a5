"""The host's disks at their worst moment: they lose power, run full, cannot be read; nothing promised is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fault_disk import FaultDisk
from support.requirements import ROOT

from kvmlite import Disk, Exited, GuestConfig, LinuxGuest

from .conftest import STRETCH

pytestmark = pytest.mark.faults

MIB = 1 << 20
PATIENCE_S = 20 * STRETCH
LOADED_GUESTS = int(os.environ.get("KVMLITE_LOADED_GUESTS", "4"))
POWER_CUTS = int(os.environ.get("KVMLITE_POWER_CUTS", "3"))

BLOCK = 4096
LOAD_SIZE = 16 * MIB  # fio's
SLOTS = 1024  # blocks behind it, written one after the other and each made durable
IMAGE_SIZE = LOAD_SIZE + SLOTS * BLOCK

# argv: kernel, image, tools, script. The VMM that is killed.
VMM = """
import sys
from kvmlite import Disk, GuestConfig, LinuxGuest

kernel, image, tools, script = sys.argv[1:]
disks = (Disk(path=image), Disk(path=tools, read_only=True))
with LinuxGuest(GuestConfig(kernel=kernel, devices=disks, features=("blk", "ext4"))) as guest:
    guest.start()
    guest.wait_agent()
    guest.run_to_end(guest.exec(["sh", "-c", script], stdout=1, stderr=2))
"""

# Prints each number once its block is durable, beside a load that flushes now and then.
WORKLOAD = """
mount -t ext4 -o ro /dev/vdb /mnt && mount --bind /dev /mnt/dev && mount -t tmpfs none /mnt/tmp || exit 1
chroot /mnt /usr/bin/fio --name=load --filename=/dev/vda --rw=randwrite --bs=4k --size=16M --time_based --runtime=1000 \
    --fsync=8 --verify=crc32c --do_verify=0 --verify_state_save=0 --randrepeat=0 --thread >/dev/null &
writes=0
until [ $writes -gt 100 ]; do sleep 0.05; read -r a b c d writes rest < /sys/block/vda/stat; done
n=0
while :; do
    n=$((n + 1))
    printf '%-4095d\\n' $n | dd of=/dev/vda bs=4096 seek=$((4096 + n % 1024)) conv=fsync,notrunc 2>/dev/null && echo $n
done
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with this host's fio and its libraries."""
    root = tmp_path_factory.mktemp("tools")
    listed = subprocess.run(["ldd", "/usr/bin/fio"], check=True, capture_output=True, text=True).stdout.split()
    for name in ("/usr/bin/fio", *(word for word in listed if word.startswith("/"))):
        target = root / name[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, target)
    for name in ("dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    image = tmp_path_factory.mktemp("image") / "tools.img"
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", root, image, "160M"],
        check=True, capture_output=True,
    )  # fmt: skip
    shutil.rmtree(root)
    return image


@contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    """An ext4 file system while it is mounted."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "ext4", device, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def fio(image: Path, *arguments: str) -> None:
    """Run fio on the part of the image that is its own."""
    command = ["fio", "--name=own", f"--filename={image}", "--bs=4k", f"--size={LOAD_SIZE}", "--verify=crc32c"]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, cwd=image.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def cut_power(vmm: subprocess.Popen[bytes], disk: FaultDisk) -> None:
    """Both at once, as far as can be."""
    steps = [disk.fail, vmm.kill]
    random.shuffle(steps)
    for step in steps:
        step()


def run_until_power_cut(vmm: subprocess.Popen[bytes], disk: FaultDisk) -> list[int]:
    """Cut the power of a running VMM and its disk; the numbers that the guest was told are safe."""
    assert vmm.stdout is not None
    first = vmm.stdout.readline()
    assert first, "the guest wrote nothing"
    time.sleep(random.uniform(0.0, 0.2 * STRETCH))
    cut_power(vmm, disk)
    told = [first, *vmm.stdout.read().splitlines(keepends=True)]
    assert vmm.wait(PATIENCE_S) == -signal.SIGKILL
    return [int(line) for line in told if line.endswith(b"\n")]


def check_numbers(image: Path, acknowledged: int) -> None:
    """Every block that was acknowledged holds its number, or a later one of the same slot."""
    with image.open("rb") as file:
        file.seek(LOAD_SIZE)
        blocks = file.read(SLOTS * BLOCK)
    for number in range(max(1, acknowledged - SLOTS + 1), acknowledged + 1):
        slot = number % SLOTS
        text = blocks[slot * BLOCK : (slot + 1) * BLOCK].rstrip(b"\0")
        assert text.endswith(b"\n"), f"block of {number} is {text[:20]!r}..."
        assert int(text) in (number, number + SLOTS), number


@pytest.mark.parametrize("number", range(POWER_CUTS))
def test_a_power_cut_loses_no_flush_that_was_acknowledged(
    kernel: Path, tools: Path, tmp_path: Path, number: int
) -> None:
    with FaultDisk(tmp_path, 64 * MIB) as disk:
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", disk.path], check=True, capture_output=True)
        with mounted(disk.path, tmp_path / "host") as directory:
            image = directory / "image"
            with image.open("wb") as file:
                file.truncate(IMAGE_SIZE)
            fio(image, "--rw=write", "--do_verify=0", "--end_fsync=1")
            before = image.read_bytes()[:LOAD_SIZE]
            vmm = subprocess.Popen([sys.executable, "-c", VMM, kernel, image, tools, WORKLOAD], stdout=subprocess.PIPE)
            try:
                numbers = run_until_power_cut(vmm, disk)
            finally:
                vmm.kill()
                vmm.communicate()
        disk.mend()
        with mounted(disk.path, tmp_path / "host"):
            check_numbers(image, numbers[-1])
            assert image.read_bytes()[:LOAD_SIZE] != before, "the load wrote nothing"
            fio(image, "--rw=read", "--verify_fatal=1")  # no block is torn, or in another's place
    print(f"power cut {number}: {len(numbers)} acknowledged flushes")


@pytest.mark.timeout(300 + 60 * STRETCH * max(0, LOADED_GUESTS - 4))
def test_guests_with_disks_networks_and_directories_leave_nothing_on_the_host(kernel: Path, tmp_path: Path) -> None:
    """As ``tests/host/test_nothing_left.py``, with guests that use them."""
    for name in ("disk", "other"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(MIB)
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}/tests", "TMPDIR": str(tmp_path / "tmp")}
    program = ROOT / "tests/support/loaded_machines.py"
    command = ["unshare", "--net", sys.executable, program, kernel, tmp_path, str(LOADED_GUESTS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    for name in ("interfaces", "rules", "forwarding", "processes", "files", "mounts"):
        assert after[name] == before[name], name


def test_a_full_disk_and_bad_sectors_are_the_guests_io_errors_and_the_user_is_told(
    kernel: Path, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "none", tmp_path / "small"], check=True)
    image = tmp_path / "small/image"
    try:
        with image.open("wb") as file:
            file.truncate(8 * MIB)
        with FaultDisk(tmp_path, 8 * MIB) as bad:
            bad.fail_between(4096, 4104)  # the page at 2 MiB
            config = GuestConfig(
                kernel=kernel, devices=(Disk(path=str(image)), Disk(path=bad.path, direct=True)), features=("blk",)
            )
            with LinuxGuest(config) as guest:
                guest.start()
                guest.wait_agent()
                use_full_disk(guest, tmp_path / "small")
                use_bad_sectors(guest)
                report = guest.run_to_end(guest.exec(["true"]))
                warnings = guest.machine.warnings
        assert report.outcome == Exited(code=0)
        assert image.read_bytes() == b"early\n".ljust(MIB, b"\0") + b"y\n" * (2 * MIB) + bytes(3 * MIB)
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)
    assert [text for text in warnings if "No space left on device" in text and str(image) in text] == [warnings[0]]
    assert [text for text in warnings if "Input/output error" in text and bad.path in text] == [warnings[1]]
    assert len(warnings) == 2, warnings


def shell(guest: LinuxGuest, script: str) -> tuple[int, bytes, bytes]:
    handle = guest.exec(["sh", "-c", script])
    return handle.wait(PATIENCE_S), handle.stdout, handle.stderr


def use_full_disk(guest: LinuxGuest, directory: Path) -> None:
    """Run into its end, twice; go on when there is room."""
    assert shell(guest, "echo early | dd of=/dev/vda conv=fsync 2>/dev/null")[0] == 0
    write = "yes | dd of=/dev/vda bs=1M seek=1 count=4 iflag=fullblock conv=fsync"
    for _ in range(2):
        status, _, errors = shell(guest, write)
        assert (status, b"Input/output error" in errors) == (1, True), errors
    assert shell(guest, "head -n 1 /dev/vda") == (0, b"early\n", b"")
    subprocess.run(["mount", "-o", "remount,size=64M", directory], check=True)
    status, _, errors = shell(guest, write)
    assert status == 0, errors


def use_bad_sectors(guest: LinuxGuest) -> None:
    """The bad page is an error to read and to write, what is around it is not."""
    assert shell(guest, "yes | dd of=/dev/vdb bs=4k count=512 iflag=fullblock conv=fsync")[0] == 0
    assert shell(guest, "yes | dd of=/dev/vdb bs=4k seek=513 count=511 iflag=fullblock conv=fsync")[0] == 0
    status, _, errors = shell(guest, "yes | dd of=/dev/vdb bs=4k seek=512 count=1 iflag=fullblock conv=fsync")
    assert (status, b"Input/output error" in errors) == (1, True), errors
    good = "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vdb bs=4k {} 2>/dev/null | tr -d 'y\\n' | wc -c"
    assert shell(guest, good.format("count=512"))[1] == b"0\n"
    assert shell(guest, good.format("skip=513 count=511"))[1] == b"0\n"
    status, _, errors = shell(guest, "dd if=/dev/vdb of=/dev/null bs=4k skip=512 count=1")
    assert (status, b"Input/output error" in errors) == (1, True), errors
