"""``kvmlite run -- CMD`` in a pipeline and on a terminal."""

from __future__ import annotations

import hashlib
import os
import pty
import select
import struct
import termios
import time
from fcntl import ioctl
from pathlib import Path

from support.command import Command

from .conftest import SOON_S


def test_64_mib_pass_through_a_pipe(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite.shell(
        '"$@" | wc -c; exit ${PIPESTATUS[0]}', "run", "--kernel", kernel, "--", "head", "-c", "64M", "/dev/zero",
        timeout_s=280,
    )  # fmt: skip
    assert (ended.code, ended.stdout, ended.stderr) == (0, b"67108864\n", "")


def test_input_of_8_mib_comes_back_the_same(kvmlite: Command, kernel: Path) -> None:
    data = os.urandom(8 << 20)
    ended = kvmlite("run", "--kernel", kernel, "--", "sh", "-c", "cat; exit 5", input=data, timeout_s=280)
    assert (ended.code, ended.stderr) == (5, "")
    assert hashlib.sha256(ended.stdout).digest() == hashlib.sha256(data).digest()


def test_a_reader_that_stops_reading_ends_the_command(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite.shell(
        '"$@" | head -1; exit ${PIPESTATUS[0]}', "run", "--kernel", kernel, "--", "yes", timeout_s=280
    )
    assert (ended.code, ended.stdout, ended.stderr) == (141, b"y\n", "")


def test_output_that_cannot_be_written_is_no_success(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite.shell('exec "$@" >/dev/full', "run", "--kernel", kernel, "--", "echo", "lost", timeout_s=280)
    assert ended.code == 125
    assert "No space left on device" in ended.complaint


def test_closed_streams_are_as_good_as_dev_null(kvmlite: Command, kernel: Path) -> None:
    script = "read line; echo lost; echo lost >&2; exit 6"
    ended = kvmlite.shell('exec "$@" <&- >&- 2>&-', "run", "--kernel", kernel, "--", "sh", "-c", script, timeout_s=280)
    assert (ended.code, ended.stdout, ended.stderr) == (6, b"", "")


def test_a_command_that_cannot_start_gives_the_codes_of_a_shell(kvmlite: Command, kernel: Path) -> None:
    ended = kvmlite("run", "--kernel", kernel, "--", "nosuch", timeout_s=280)
    assert ended.code == 127
    assert ended.complaint.startswith("nosuch: No such file or directory")


def test_a_terminal_has_its_size_and_passes_ctrl_c_to_the_command(kvmlite: Command, kernel: Path) -> None:
    leader, terminal = pty.openpty()
    try:
        ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 43, 132, 0, 0))
        before = termios.tcgetattr(terminal)
        script = "trap 'echo caught; exit 9' INT; stty size; echo ready; while :; do sleep 0.1; done"
        process = kvmlite.start(
            "run", "--kernel", kernel, "--", "sh", "-c", script, stdin=terminal, stdout=terminal, stderr=terminal
        )
        shown = read_until(leader, b"ready")
        assert b"43 132\r\n" in shown
        ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
        os.write(leader, b"\x03")
        assert process.wait(SOON_S) == 9
        assert b"caught" in read_until(leader, b"caught")
        assert termios.tcgetattr(terminal) == before
    finally:
        os.close(leader)
        os.close(terminal)


def read_until(fd: int, wanted: bytes, timeout_s: float = 200.0) -> bytes:
    """What a terminal shows up to ``wanted``."""
    shown, deadline = b"", time.monotonic() + timeout_s
    while wanted not in shown:
        assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], shown
        shown += os.read(fd, 4096)
    return shown
