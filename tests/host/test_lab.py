"""The lab itself: what comes out is what the command did, and nothing is left of it.

Each start costs seconds, so one command shows most of it and the tests look at its result.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LAB = ROOT / "scripts/lab"

pytestmark = [pytest.mark.lab_host, pytest.mark.timeout(400)]

#: Every byte value, and more than any pipe or port on the way holds.
STDIN = bytes(range(256)) * 4096

SCRIPT = """
sha256sum
printf 'out %s\\n' "$(pwd)" "$(cat "$WITH/note")" "$PLAIN" "$KVMLITE_MARK" "$KVMLITE_LAB" "$(hostname)"
test -c /dev/kvm && test -c /dev/net/tun && test -c /dev/vhost-net && test -c /dev/vhost-vsock && echo devices
command -v kvmlite
ls "$KVMLITE_TEST_KERNELS"/linux-image-cloud-amd64/boot
date +%s
for cpu in 0 1; do
    port=$(grep -lx heartbeat$cpu /sys/class/virtio-ports/*/name)
    device=$(echo "$port" | sed 's/.*vport\\([0-9]*\\)p.*/virtio\\1/')
    interrupt=$(dirname "$(grep -lx "$device" /sys/kernel/irq/*/actions)")
    for attempt in $(seq 600); do
        count=$(cut -d, -f$((cpu + 1)) "$interrupt/per_cpu_count")
        if [ "$count" -ge 5 ]; then break; fi
        sleep 0.1
    done
    test "$count" -ge 5 && echo "heartbeat $cpu"
done
printf 'err\\0\\377' >&2
mkdir -p "$LAB_OUT/deep" && printf result >"$LAB_OUT/deep/file"
touch "$WITH/stray" stray
sleep 1000 &
exit 37
"""


@dataclass(frozen=True)
class Visit:
    """One command in the lab, and what came of it."""

    done: subprocess.CompletedProcess[bytes]
    stray: Path
    out: Path
    seen: list[str]
    begin_s: float
    end_s: float


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """Run ``SCRIPT`` in the lab, once."""
    taken, out = tmp_path_factory.mktemp("with"), tmp_path_factory.mktemp("out")
    (taken / "note").write_text("taken along")
    environment = {**os.environ, "LAB_OUT": str(out), "PLAIN": "withheld", "KVMLITE_MARK": "passed"}
    command = [LAB, "--cpus", "2", "--with", taken, "--env", f"WITH={taken}", "--", "sh", "-c", SCRIPT]
    begin_s = time.time()
    done = subprocess.run(command, check=False, cwd=ROOT / "src", env=environment, input=STDIN, capture_output=True)
    return Visit(done, taken / "stray", out, done.stdout.decode().splitlines(), begin_s, time.time())


def test_exit_code_is_the_commands(visit: Visit) -> None:
    assert visit.done.returncode == 37


def test_stdin_arrives_whole_and_ends(visit: Visit) -> None:
    assert visit.seen[0] == f"{hashlib.sha256(STDIN).hexdigest()}  -"


def test_stderr_is_apart_from_stdout_and_binary(visit: Visit) -> None:
    assert visit.done.stderr == b"err\0\xff"


def test_tree_and_taken_paths_are_at_the_same_places(visit: Visit) -> None:
    assert visit.seen[1:3] == [f"out {ROOT}/src", "out taken along"]


def test_environment_is_passed_by_name_only(visit: Visit) -> None:
    assert visit.seen[3:7] == ["out ", "out passed", "out 1", "out lab"]


def test_devices_command_and_kernels_are_there(visit: Visit) -> None:
    devices, command, config, image = visit.seen[7:11]
    assert (devices, command) == ("devices", f"{ROOT}/.venv/bin/kvmlite")
    assert (config[:7], image[:8]) == ("config-", "vmlinuz-")


def test_clock_is_right(visit: Visit) -> None:
    assert visit.begin_s - 60 < int(visit.seen[11]) < visit.end_s + 60


def test_each_cpu_is_interrupted_from_outside_again_and_again(visit: Visit) -> None:
    assert visit.seen[12:] == ["heartbeat 0", "heartbeat 1"]


def test_more_cpus_than_can_be_kept_alive_are_refused() -> None:
    done = subprocess.run([LAB, "--cpus", "9", "true"], check=False, capture_output=True)
    assert done.returncode == 2
    assert b"--cpus 9: 1 to 8 expected" in done.stderr


def test_only_the_out_directory_comes_back(visit: Visit) -> None:
    assert [path.relative_to(visit.out).as_posix() for path in visit.out.rglob("*")] == [
        "deep",
        "deep/file",
    ]
    assert (visit.out / "deep/file").read_bytes() == b"result"
    assert not visit.stray.exists()
    assert not (ROOT / "src/stray").exists()


def test_timeout_ends_the_command_with_124_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    environment = {**os.environ, "LAB_OUT": str(tmp_path / "out")}
    script = "echo begun; echo kept >$LAB_OUT/file; sleep 1000"
    for limit_s in (1, 5, 25, 100):  # a busy host may not get as far as the script in a second
        command = [LAB, "--timeout", str(limit_s), "--", "sh", "-c", script]
        done = subprocess.run(command, check=False, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 124
        assert done.stderr.startswith(b"lab: timeout after %d s" % limit_s)
        if (tmp_path / "out/file").exists():
            break
    assert done.stdout == b"begun\n"
    assert (tmp_path / "out/file").read_bytes() == b"kept\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_leaves_no_machine_behind(number: int, status: int) -> None:
    with subprocess.Popen([LAB, "sleep", "1000"], stdin=subprocess.DEVNULL) as lab:
        machine = _wait_for_child(lab.pid)
        lab.send_signal(number)
        assert lab.wait(timeout=120) == status
    deadline = time.monotonic() + 30
    while _is_running(machine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(machine)


def test_a_lab_that_cannot_come_up_is_told_from_a_command_that_fails() -> None:
    done = subprocess.run([LAB, "--with", "/nowhere", "true"], check=False, capture_output=True)
    assert done.returncode == 125
    assert done.stderr == b"lab: --with /nowhere: no such file or directory\n"


def _wait_for_child(parent: int) -> int:
    """Return the pid of the QEMU that a lab has started; setpriv becomes it by exec."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, ProcessLookupError):  # a child or a thread has ended meanwhile
            for child in _children(parent):
                if b"qemu-system" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]:
                    return child
        time.sleep(0.01)
    raise AssertionError("the lab starts no machine")


def _children(parent: int) -> Iterator[int]:
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        yield from map(int, path.read_text().split())


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
