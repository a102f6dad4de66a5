"""Helper processes: started, watched, ended, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.leaks import open_descriptors

from kvmlite.errors import HostError
from kvmlite.host import daemon as daemon_module
from kvmlite.host.daemon import Daemon, find_program
from kvmlite.testing import ManualLoop

PATIENCE_S = 60.0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_a_daemon_that_ends_by_itself_is_noticed_with_its_last_words() -> None:
    loop, told = ManualLoop(), []
    daemon = Daemon("helper", ["sh", "-c", "echo begin; echo no such disk >&2; echo; exit 3"])
    daemon.watch(loop, lambda: told.append(daemon.end_text()))
    assert daemon.wait(PATIENCE_S)
    loop.run()
    assert told == ["ended with status 3: no such disk"]
    assert loop.watched == set()
    assert daemon.tail() == "begin\nno such disk\n\n"
    daemon.end()


def test_a_killed_daemon_says_so() -> None:
    daemon = Daemon("helper", ["sleep", "1000"])
    os.kill(daemon.pid, signal.SIGKILL)
    assert daemon.wait(PATIENCE_S)
    assert daemon.end_text() == "was killed (SIGKILL)"
    daemon.end()
    daemon.end()


def test_nobody_is_left_behind_by_a_start_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen
    given_up = threading.Event()
    abandon = Daemon._abandon

    def start_late(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        assert given_up.wait(PATIENCE_S)
        processes.append(start(*args, **options))
        return processes[0]

    monkeypatch.setattr(daemon_module.subprocess, "Popen", start_late)
    monkeypatch.setattr(daemon_module, "_START_TIMEOUT_S", 0.01)
    monkeypatch.setattr(Daemon, "_abandon", lambda daemon: (given_up.set(), abandon(daemon)))
    monkeypatch.setattr(daemon_module, "_KILL_TIMEOUT_S", PATIENCE_S)
    descriptors = open_descriptors()
    with pytest.raises(HostError, match="could not be started"):
        Daemon("helper", ["sleep", "1000"])
    assert processes[0].returncode == -signal.SIGKILL
    assert open_descriptors() == descriptors


def test_ending_it_tells_no_watcher() -> None:
    loop, told = ManualLoop(), []
    daemon = Daemon("helper", ["sleep", "1000"])
    daemon.watch(loop, lambda: told.append("ended"))
    daemon.end()
    loop.run()
    assert not told
    assert loop.watched == set()
    assert not is_alive(daemon.pid)


def test_one_that_ignores_sigterm_is_killed_and_its_children_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    daemon = Daemon(
        "helper", ["sh", "-c", f"trap '' TERM; sleep 1000 & echo $! > {note}.new; mv {note}.new {note}; wait"]
    )
    deadline = time.monotonic() + PATIENCE_S
    while not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    daemon.end(timeout_s=0.1)
    assert daemon.end_text() == "was killed (SIGKILL)"
    wait_gone(int(note.read_text()))


def test_it_inherits_the_descriptors_and_the_environment_it_is_given() -> None:
    reader, writer = os.pipe()
    try:
        daemon = Daemon(
            "helper", ["sh", "-c", f"echo $WORD > /proc/self/fd/{writer}"], pass_fds=(writer,), env={"WORD": "hello"}
        )
        os.close(writer)
        assert os.read(reader, 100) == b"hello\n"
        assert daemon.wait(PATIENCE_S)
        daemon.end()
    finally:
        os.close(reader)


def test_a_program_that_is_missing_names_its_package() -> None:
    with pytest.raises(HostError, match="no-such-daemon is not installed") as caught:
        Daemon("helper", ["/usr/lib/no-such-daemon"], package="no-such-package")
    assert caught.value.hint == "apt-get install no-such-package"
    assert find_program("/no/such", "sh") == "/bin/sh" or find_program("/no/such", "sh") == "/usr/bin/sh"


def test_what_it_writes_is_kept_up_to_a_limit() -> None:
    daemon = Daemon("helper", ["sh", "-c", "yes 0123456789 | head -n 20000; echo last"])
    assert daemon.wait(PATIENCE_S)
    daemon.end()
    assert len(daemon.tail()) == 4096
    assert daemon.last_words() == "last"


PARENT = """
import os, sys, threading
from kvmlite.host.daemon import Daemon
def start():
    print(Daemon("helper", ["sleep", "1000"]).pid, flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
sys.stdin.read()
"""


def test_it_dies_with_its_parent_but_not_with_the_thread_that_asked_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.05)
        assert is_alive(pid)
        parent.kill()
        wait_gone(pid)
