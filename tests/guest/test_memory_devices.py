"""Devices that change what memory a guest has, driven by Linux."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from support.command import Command

from kvmlite import Balloon, Exited, GuestConfig, LinuxGuest, Pmem, VmmError
from kvmlite.devices.balloon import VirtioBalloon

from .conftest import STRETCH

MIB = 1 << 20
FILE_MIB = 64


def resident_mib() -> int:
    """Memory of this process, its guests' RAM included."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) >> 10


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it holds within 10 s (in the lab a minute)."""
    deadline = time.monotonic() + 10 * STRETCH
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def make_image(path: Path) -> Path:
    """A file system with one file, ``hello``."""
    source = path.with_suffix(".d")
    source.mkdir()
    (source / "hello").write_text(path.name)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", source, path, "15M"], check=True)
    return path


def test_a_balloon_gives_memory_back_to_the_host(kernel: Path, mappings: None) -> None:
    config = GuestConfig(kernel=kernel, memory_mib=256, devices=(Balloon(),), features=("balloon",))
    with LinuxGuest(config) as guest:
        guest.start()
        guest.wait_agent()
        balloon = guest.machine.device(VirtioBalloon)

        fill = f"mkdir /t && mount -t tmpfs t /t && dd if=/dev/zero of=/t/x bs=1M count={FILE_MIB} 2>&1"
        assert guest.exec(["sh", "-c", fill]).wait(10 * STRETCH) == 0
        full = resident_mib()
        statistics = balloon.statistics(10 * STRETCH)
        assert statistics.total is not None
        assert 200 * MIB < statistics.total < 256 * MIB
        assert statistics.available is not None
        assert statistics.available < statistics.total - FILE_MIB * MIB

        assert guest.exec(["rm", "/t/x"]).wait(10 * STRETCH) == 0
        assert wait_for(lambda: resident_mib() <= full - FILE_MIB * 3 // 4), (full, resident_mib())
        assert balloon.reported_size >= FILE_MIB * MIB * 3 // 4

        balloon.resize(50)
        assert wait_for(lambda: balloon.actual_mib == 50), balloon.actual_mib
        assert balloon.inflated_size >= 50 * MIB
        less = balloon.statistics(10 * STRETCH)
        assert less.free is not None
        assert statistics.total - less.free > 50 * MIB
        balloon.resize(0)
        assert wait_for(lambda: balloon.actual_mib == 0), balloon.actual_mib

        report = guest.run_to_end(guest.exec(["true"]))
    assert report.outcome == Exited(code=0)
    assert guest.machine.warnings == ()


def test_the_command_gives_a_guest_a_balloon(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite("run", "--balloon", "--kernel", kernel, "--", "ls", "/sys/bus/virtio/drivers/virtio_balloon")
    assert ended.code == 0
    assert b"virtio1" in ended.stdout


def test_files_as_persistent_memory(kernel: Path, mappings: None, tmp_path: Path) -> None:
    images = {mode: make_image(tmp_path / mode) for mode in ("read-only", "private", "shared")}
    config = GuestConfig(
        kernel=kernel,
        memory_mib=256,
        devices=tuple(Pmem(path=path, mode=mode) for mode, path in images.items()),
        features=("pmem", "ext4"),
    )
    untouched = {mode: images[mode].read_bytes() for mode in ("read-only", "private")}
    with LinuxGuest(config) as guest:
        guest.start()
        guest.wait_agent()
        mount = "for n in 0 1 2; do mkdir /$n; done; mount -t ext4 -o ro,dax /dev/pmem0 /0 && cat /0/hello && "
        mount += "mount -t ext4 /dev/pmem1 /1 && cat /1/hello && mount -t ext4 -o dax /dev/pmem2 /2 && cat /2/hello"
        handle = guest.exec(["sh", "-c", mount])
        assert handle.wait(10 * STRETCH) == 0, handle.stderr
        assert handle.stdout == b"read-onlyprivateshared"
        write = "for n in 1 2; do echo $n > /$n/new && sync && cat /$n/new; umount /$n; done"
        handle = guest.exec(["sh", "-c", write])
        assert handle.wait(10 * STRETCH) == 0
        assert handle.stdout == b"1\n2\n"
        for mode, content in untouched.items():
            assert images[mode].read_bytes() == content, mode
        show = ["debugfs", "-R", "cat new", images["shared"]]
        assert subprocess.run(show, capture_output=True, check=True).stdout == b"2\n"

        os.truncate(images["read-only"], 4096)
        report = guest.run_to_end(guest.exec(["sh", "-c", "cat /0/hello; ls /0/lost+found"]))
    assert isinstance(report.outcome, VmmError)
    assert "the host cannot give the guest a page of its memory" in str(report.outcome.error)
    path = images["read-only"]
    warning = f"pmem1: {path} was cut short from {15 << 20} to 4096 bytes while the guest had it"
    assert guest.machine.warnings == (warning,)
