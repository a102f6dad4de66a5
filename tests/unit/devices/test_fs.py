"""virtio-fs: the options of both virtiofsds, and QEMU's own against a guest that asks for what it must not get."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmlite import ConfigError, HostError, SharedDirectory
from kvmlite.abi.virtio_fs import FUSE_IN_HEADER, FUSE_OUT_HEADER
from kvmlite.devices import fs, vhost_user
from kvmlite.host import confine
from kvmlite.testing import VirtioRig

PATIENCE_S = 60.0
QEMU = Path("/usr/lib/qemu/virtiofsd")

LOOKUP, SETATTR, MKDIR, OPEN, INIT, OPENDIR, READDIR = 1, 4, 9, 14, 26, 27, 28


def test_qemus_virtiofsd_gets_one_word_with_options() -> None:
    spec = SharedDirectory(path="/a,b", tag="x", cache="always", xattr=True, submounts=True)
    assert fs.virtiofsd_options(spec, 7, is_rust=False, rootless=False) == [
        "-f", "--fd=7", "-o",
        f"source={confine.PLACE},sandbox=namespace,log_level=warn,cache=always,xattr,announce_submounts",
    ]  # fmt: skip


def test_the_other_virtiofsd_gets_options_of_its_own() -> None:
    spec = SharedDirectory(path="/a", tag="x", cache="none", xattr=True, submounts=True)
    assert fs.virtiofsd_options(spec, 7, is_rust=True, rootless=True) == [
        "--fd=7", f"--shared-dir={confine.PLACE}", "--log-level=warn", "--sandbox=namespace", "--cache=never", "--xattr",
        "--announce-submounts", "--rlimit-nofile=0",
    ]  # fmt: skip


def test_a_directory_is_read_only_unless_asked_otherwise() -> None:
    assert fs.confine_options(SharedDirectory(path="/a", tag="x"), rootless=False) == ["--read-only"]
    spec = SharedDirectory(path="/a", tag="x", read_only=False, hidden=("proc", "sys"))
    assert fs.confine_options(spec, rootless=True) == ["--rootless", "--hide=proc", "--hide=sys"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tag": ""}, "has not 1 to 36 bytes"),
        ({"tag": "ä" * 19}, "has not 1 to 36 bytes"),
        ({"tag": "a\x00"}, "has not 1 to 36 bytes"),
        ({"cache": "never"}, "unknown cache mode 'never'; choose one of auto, always, none"),
        ({"hidden": ("/proc",)}, "no name inside"),
        ({"hidden": ("a/../..",)}, "no name inside"),
    ],
)
def test_wrong_specs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SharedDirectory(**{"path": "/a", "tag": "x", **values})  # type: ignore[arg-type]


def test_what_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, message in (("file", "file is not a directory"), ("nothing", "nothing: no such directory")):
        spec = SharedDirectory(path=tmp_path / name, tag="x")
        with pytest.raises(ConfigError, match=message):
            VirtioRig(spec.attach, memory_backing="memfd")


def test_a_missing_virtiofsd_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fs, "_RUST_PROGRAMS", ())
    monkeypatch.setattr(fs, "_QEMU_PROGRAM", "/nonexistent/virtiofsd")
    with pytest.raises(HostError, match="virtiofsd is not installed") as caught:
        VirtioRig(SharedDirectory(path=tmp_path, tag="x").attach, memory_backing="memfd")
    assert caught.value.hint == "apt-get install qemu-system-common"


def test_an_ordinary_user_without_subordinate_ids_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho virtiofsd version 7.2\n")
    program.chmod(0o755)
    monkeypatch.setattr(fs, "_RUST_PROGRAMS", (str(program),))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(HostError, match="takes subordinate user ids") as caught:
        VirtioRig(SharedDirectory(path=tmp_path, tag="x").attach, memory_backing="memfd")
    assert "uidmap" in caught.value.hint


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a daemon that has closed the connection says at its end is waited for, however busy the host is."""
    monkeypatch.setattr(vhost_user, "_LAST_WORDS_S", PATIENCE_S)


class Guest:
    """Speaks FUSE in the rings itself, as no kernel would."""

    def __init__(self, rig: VirtioRig) -> None:
        self.rig = rig
        self._unique = 0
        rig.start()
        self.ask(INIT, 0, struct.pack("<IIII", 7, 31, 65536, 0))

    def ask(self, opcode: int, node: int, body: bytes, room: int = 4096) -> tuple[int, bytes]:
        """Return (error, answer)."""
        self._unique += 1
        header = FUSE_IN_HEADER.pack(FUSE_IN_HEADER.size + len(body), opcode, self._unique, node, 0, 0, 0, 0, 0)
        queue = self.rig.queues[1]
        queue.add_chain(readable=[header + body], writable=[room])
        self.rig.driver.notify(1)
        deadline = time.monotonic() + PATIENCE_S
        while (used := queue.take_used()) is None:
            assert time.monotonic() < deadline, self.rig.warnings
            self.rig.loop.run()
            time.sleep(0.001)
        _, error, unique = FUSE_OUT_HEADER.unpack(used.data[: FUSE_OUT_HEADER.size])
        assert unique == self._unique
        return -error, used.data[FUSE_OUT_HEADER.size :]

    def look_up(self, name: bytes) -> int:
        error, answer = self.ask(LOOKUP, 1, name + b"\0")
        assert error == 0
        return int(struct.unpack_from("<Q", answer)[0])


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    (tmp_path / "file, with=comma").write_text("as it was")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "secret").touch()
    os.mknod(tmp_path / "null", 0o666 | 0o020000, os.makedev(1, 3))
    return tmp_path


@pytest.fixture
def rig(shared: Path) -> Iterator[VirtioRig]:
    spec = SharedDirectory(path=shared, tag="x", hidden=("hidden", "nothing"))
    with VirtioRig(spec.attach, memory_backing="memfd") as rig:
        yield rig
    assert not rig.errors


@pytest.mark.tools
@pytest.mark.root
def test_no_request_writes_to_a_read_only_directory(rig: VirtioRig, shared: Path) -> None:
    guest = Guest(rig)
    node = guest.look_up(b"file, with=comma")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert guest.ask(OPEN, node, struct.pack("<II", flags, 0))[0] == errno.EROFS
    setattr_mode = struct.pack("<IIQQQQQQIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o777, 0, 0, 0, 0)
    assert guest.ask(SETATTR, node, setattr_mode)[0] == errno.EROFS
    assert guest.ask(MKDIR, 1, struct.pack("<II", 0o755, 0) + b"new\0")[0] == errno.EROFS
    assert guest.ask(OPEN, node, struct.pack("<II", os.O_RDONLY, 0))[0] == 0
    assert (shared / "file, with=comma").read_text() == "as it was"
    assert sorted(path.name for path in shared.iterdir()) == ["file, with=comma", "hidden", "null"]


@pytest.mark.tools
@pytest.mark.root
def test_device_nodes_are_not_opened_and_hidden_names_are_empty(rig: VirtioRig) -> None:
    guest = Guest(rig)
    assert guest.ask(OPEN, guest.look_up(b"null"), struct.pack("<II", os.O_RDWR, 0))[0] != 0
    hidden = guest.look_up(b"hidden")
    error, answer = guest.ask(OPENDIR, hidden, struct.pack("<II", os.O_RDONLY, 0))
    assert error == 0
    handle = struct.unpack_from("<Q", answer)[0]
    error, answer = guest.ask(READDIR, hidden, struct.pack("<QQIIQII", handle, 0, 2048, 0, 0, 0, 0))
    assert (error, b"secret" in answer) == (0, False)
    assert guest.ask(LOOKUP, hidden, b"secret\0")[0] == errno.ENOENT


@pytest.mark.tools
@pytest.mark.root
def test_a_virtiofsd_that_was_killed_is_an_error_in_the_guest_and_one_warning(rig: VirtioRig) -> None:
    guest = Guest(rig)
    node = guest.look_up(b"file, with=comma")
    os.kill(rig.device._back_end.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    while guest.ask(OPEN, node, struct.pack("<II", os.O_RDONLY, 0))[0] != errno.ENOTCONN:
        pass
    assert guest.ask(LOOKUP, 1, b"x\0")[0] == errno.ENOTCONN
    assert len(rig.warnings) == 1
    assert rig.warnings[0].startswith("device0: virtiofsd was killed (SIGKILL)")


@pytest.mark.tools
@pytest.mark.root
def test_a_host_that_refuses_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(fs, "_RUST_PROGRAMS", (str(program),))
    with pytest.raises(HostError, match="virtiofsd ended with status 3: no such option"):
        VirtioRig(SharedDirectory(path=tmp_path, tag="x").attach, memory_backing="memfd")
    assert shutil.which(str(program))


OWNER = """
import sys
from kvmlite import SharedDirectory
from kvmlite.testing import VirtioRig
rig = VirtioRig(SharedDirectory(path=sys.argv[1], tag="x").attach, memory_backing="memfd")
rig.start()
print(rig.device._back_end.pid, flush=True)
sys.stdin.read()
"""


def members(session: int) -> list[int]:
    """Processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.tools
@pytest.mark.root
def test_nothing_is_left_of_virtiofsd_when_its_owner_is_killed(shared: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(shared)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        session = int(owner.stdout.readline())
        deadline = time.monotonic() + PATIENCE_S
        while len(members(session)) != 2:  # one waits for the other, which has a process namespace of its own
            assert time.monotonic() < deadline, members(session)
            time.sleep(0.01)
        owner.kill()
        while members(session):
            assert time.monotonic() < deadline, members(session)
            time.sleep(0.01)
