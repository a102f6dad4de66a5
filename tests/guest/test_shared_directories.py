"""Directories of the host under a stock kernel's virtiofs: what may be written stays, what may not does not get through."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.command import Command

from kvmlite import Exited, GuestConfig, HostRoot, LinuxGuest, Mount
from kvmlite.devices import vhost_user
from kvmlite.devices.vhost_user import VhostUserDevice

pytestmark = pytest.mark.root

PATIENCE_S = 120.0

SCRIPT = """
    cat /ro/file
    for attempt in 1 2; do
        ! touch /ro/new; ! chmod 777 /ro/file; ! rm /ro/file
        mount -o remount,rw /ro
    done 2>/dev/null
    cat /ro/file
    echo from the guest > /rw/new; dd if=/dev/zero of=/rw/large bs=64k count=64 2>/dev/null; mv /rw/file /rw/moved
    echo changed > /over/file; rm -r /over/sub; ls /over
"""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a daemon that has closed the connection says at its end is waited for, however busy the host is."""
    monkeypatch.setattr(vhost_user, "_LAST_WORDS_S", PATIENCE_S)


def make_tree(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "file").write_text(f"this is {path.name}\n")
    return path


def test_modes_of_a_mount_and_the_death_of_its_server(kernel: Path, tmp_path: Path, mappings: None) -> None:
    trees = {name: make_tree(tmp_path / name) for name in ("ro", "rw", "over")}
    parts = (
        Mount(source=trees["ro"], target="/ro"),
        Mount(source=trees["rw"], target="/rw", mode="rw"),
        Mount(source=trees["over"], target="/over", mode="overlay"),
    )
    with LinuxGuest(GuestConfig(kernel=kernel, parts=parts)) as guest:
        warnings: list[str] = []
        guest.machine.call_on_warning(warnings.append)
        guest.start()
        guest.wait_agent()
        first = guest.exec(["sh", "-ec", SCRIPT])
        assert first.wait(PATIENCE_S) == 0, first.stderr
        assert first.stdout.decode().splitlines() == ["this is ro", "this is ro", "file"]
        assert not warnings

        load = guest.exec(["sh", "-c", "while cat /ro/file && ls -R /ro; do :; done; echo over"])
        load.wait_started(PATIENCE_S)
        os.kill(guest.machine.device(VhostUserDevice)._back_end.pid, signal.SIGKILL)
        assert load.wait(PATIENCE_S) == 0
        assert load.stdout.endswith(b"over\n")
        assert b"not connected" in load.stderr
        last = guest.exec(["sh", "-ec", "cat /rw/moved; ! cat /ro/file"])
        report = guest.run_to_end(last)
    assert report.outcome == Exited(code=0), last.stderr
    assert last.stdout == b"this is rw\n"
    assert len(warnings) == 1
    assert "virtiofsd was killed (SIGKILL)" in warnings[0]
    assert sorted(path.name for path in trees["ro"].iterdir()) == ["file", "sub"]
    assert (trees["ro"] / "file").stat().st_mode & 0o777 != 0o777
    assert sorted(path.name for path in trees["rw"].iterdir()) == ["large", "moved", "new", "sub"]
    assert (trees["rw"] / "new").read_text() == "from the guest\n"
    assert (trees["over"] / "file").read_text() == "this is over\n"
    assert (trees["over"] / "sub").is_dir()


def test_the_hosts_own_file_system_is_the_root_and_stays_as_it_is(kernel: Path, tmp_path: Path, mappings: None) -> None:
    shared = make_tree(tmp_path / "work")
    marker = Path("/etc/kvmlite-test-marker")
    script = f"""
        . /etc/os-release; echo $ID
        python3 -c 'import sys; print(sys.version_info[0])'
        touch {marker}; ls {marker}; ls /run; stat -c %i /proc
        cat {shared}/file; cat /shared/file
    """
    parts = (HostRoot(), Mount(source=shared, target="/shared", mode="rw"))
    with LinuxGuest(GuestConfig(kernel=kernel, parts=parts)) as guest:
        guest.start()
        guest.wait_agent()
        handle = guest.exec(["bash", "-ec", script])
        report = guest.run_to_end(handle)
    assert report.outcome == Exited(code=0), handle.stderr
    lines = handle.stdout.decode().split("\n")
    assert lines == ["debian", "3", str(marker), "1", "this is work", "this is work", ""]
    assert not marker.exists()


def test_from_the_command_line(kvmlite: Command, kernel: Path, tmp_path: Path) -> None:
    shared = make_tree(tmp_path / "work")
    script = "cat /mnt/a/file; echo x > /mnt/a/new"
    ended = kvmlite(
        "run", "--kernel", kernel, "--mount", f"{shared}:/mnt/a:rw", "--", "sh", "-c", script, timeout_s=200
    )
    assert (ended.code, ended.stdout) == (0, b"this is work\n"), ended.stderr
    assert (shared / "new").read_text() == "x\n"
    ended = kvmlite("run", "--kernel", kernel, "--mount", f"{shared}/file:/mnt/a", "--", "true", timeout_s=200)
    assert ended.code == 125
    assert "is not a directory" in ended.stderr
