from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlite.errors import HostError
from kvmlite.images.staging import PREFIX, Staging, storage_error, sweep
from kvmlite.paths import cache_home, data_home


def test_a_staging_directory_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with Staging(str(tmp_path / "store")) as staging:
        (Path(staging.path) / "a/b").mkdir(parents=True)
        (Path(staging.path) / "a/b/file").write_text("x")
        (Path(staging.path) / "a/link").symlink_to("/etc")
        assert os.stat(staging.path).st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "store") == []
    assert os.path.isdir("/etc")


def test_it_goes_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), Staging(str(tmp_path)):
        raise ValueError("mine")
    assert os.listdir(tmp_path) == []


def test_sweep_removes_what_dead_processes_left(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}1-abc/x").mkdir(parents=True)
    assert sweep(str(tmp_path)) == (str(tmp_path / f"{PREFIX}1-abc"),)
    assert os.listdir(tmp_path) == []


def test_sweep_leaves_what_is_in_use_and_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to("kernel")
    with Staging(str(tmp_path)) as staging:
        assert sweep(str(tmp_path)) == ()
        assert os.path.isdir(staging.path)
    assert sorted(os.listdir(tmp_path)) == [f"{PREFIX}link", "kernel"]


def test_sweep_of_a_missing_directory_does_nothing(tmp_path: Path) -> None:
    assert sweep(str(tmp_path / "no")) == ()


def test_a_directory_swept_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not swept:
            swept.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.rmdir(swept[0])
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Staging(str(tmp_path)) as staging:
        assert os.path.isdir(staging.path)
        assert staging.path != swept[0]


def test_ctrl_c_while_it_is_made_leaves_nothing(tmp_path: Path, interrupts: Callable[[int], None]) -> None:
    for count in range(40):
        interrupts(count)
        try:
            with Staging(str(tmp_path)):
                interrupts(-1)
                break
        except KeyboardInterrupt:
            assert os.listdir(tmp_path) == []
    assert count > 6


def test_a_place_that_cannot_be_written_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"cannot create a working directory in .*file/store: Not a directory"):
        Staging(str(tmp_path / "file/store")).__enter__()


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "KVMLITE_HOME"),
        (errno.EFBIG, "ulimit -f"),
    ],
)
def test_storage_errors_say_what_to_do(code: int, hint: str) -> None:
    error = storage_error(OSError(code, "x"), "cannot add the kernel")
    assert str(error) == f"cannot add the kernel: {os.strerror(code)}"
    assert error.errno == code
    assert hint in error.hint


def test_directories_follow_kvmlite_home_then_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("KVMLITE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert (data_home(), cache_home()) == ("/home/me/.local/share/kvmlite", "/home/me/.cache/kvmlite")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert (data_home(), cache_home()) == ("/data/kvmlite", "/home/me/.cache/kvmlite")
    monkeypatch.setenv("KVMLITE_HOME", "/k")
    assert (data_home(), cache_home()) == ("/k", "/k/cache")
