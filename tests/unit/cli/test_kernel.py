from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import kvmlite
from kvmlite.cli.kernel import kernel
from kvmlite.errors import ConfigError


def bzimage(release: str) -> bytes:
    head = bytearray(0x400)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, 0x40)
    struct.pack_into("<H", head, 0x1FE, 0xAA55)
    head[0x201:0x206] = b"\x66HdrS"
    struct.pack_into("<HI", head, 0x206, 0x20F, 0)
    struct.pack_into("<H", head, 0x20E, 0x100)
    struct.pack_into("<H", head, 0x236, 1)
    struct.pack_into("<Q", head, 0x258, 0x1000000)
    struct.pack_into("<I", head, 0x260, 0x400)
    head[0x300 : 0x300 + len(release) + 1] = release.encode() + b"\0"
    return bytes(head) + bytes(0x400)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path / "home"))
    for release in ("6.1.0-a", "6.2.0-b"):
        (tmp_path / release).write_bytes(bzimage(release))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(kernel, arguments, catch_exceptions=False)


def test_add_prints_name_digest_and_source(files: Path) -> None:
    result = run("add", str(files / "6.1.0-a"), "--name", "mine")
    name, digest, source = result.stdout.split()
    assert (name, len(digest), source) == ("mine", 12, f"file:{files}/6.1.0-a")


def test_quiet_prints_names_only(files: Path) -> None:
    assert run("add", "-q", str(files / "6.1.0-a"), str(files / "6.2.0-b")).output == "6.1.0-a\n6.2.0-b\n"
    assert run("ls", "-q").output == "6.1.0-a\n6.2.0-b\n"


def test_ls_marks_the_default(files: Path) -> None:
    run("add", str(files / "6.1.0-a"), "--default")
    run("add", str(files / "6.2.0-b"))
    lines = run("ls").output.splitlines()
    assert lines[0].split() == ["NAME", "RELEASE", "DIGEST", "MODULES", "SOURCE"]
    assert lines[1].split()[:3] == ["*", "6.1.0-a", "6.1.0-a"]
    assert lines[2].split()[:2] == ["6.2.0-b", "6.2.0-b"]
    run("default", "6.2")
    assert run("ls").output.splitlines()[2].startswith("*")


def test_ls_of_an_empty_store_is_an_empty_array(files: Path) -> None:
    assert json.loads(run("ls", "--json").output) == []


def test_json_has_everything_known(files: Path) -> None:
    run("add", str(files / "6.1.0-a"))
    (listed,) = json.loads(run("ls", "--json").output)
    assert listed == json.loads(run("show", "6.1", "--json").output)
    assert listed["name"] == listed["release"] == "6.1.0-a"
    assert (listed["names"], listed["size"], listed["modules_dir"], listed["default"]) == (
        ["6.1.0-a"],
        2048,
        None,
        True,
    )


def test_show_takes_a_path_too(files: Path) -> None:
    output = run("show", str(files / "6.1.0-a")).output
    assert "release:     6.1.0-a\n" in output
    assert "digest:      -\n" in output
    assert "default:     no\n" in output


def test_rm_prints_what_it_removed(files: Path) -> None:
    run("add", "-q", str(files / "6.1.0-a"), str(files / "6.2.0-b"))
    assert run("rm", "6.1.0-a", "6.1", "6.2").output == "6.1.0-a\n6.2.0-b\n"
    assert run("ls", "-q").output == ""


def test_rm_of_an_unknown_name_removes_nothing(files: Path) -> None:
    run("add", str(files / "6.1.0-a"))
    with pytest.raises(ConfigError, match="no kernel 'nope'"):
        run("rm", "6.1.0-a", "nope")
    assert run("ls", "-q").output == "6.1.0-a\n"


def test_a_name_is_for_one_kernel(files: Path) -> None:
    with pytest.raises(ConfigError, match="--name is for one kernel, not 2"):
        run("add", str(files / "6.1.0-a"), str(files / "6.2.0-b"), "--name", "x")


def test_a_damaged_entry_is_a_warning(files: Path) -> None:
    run("add", str(files / "6.1.0-a"))
    next((files / "home/kernels").glob("*/manifest.json")).write_text("{")
    assert "warning: kernel" in run("ls").output


def test_help_imports_nothing_of_the_store() -> None:
    import subprocess
    import sys

    code = "import sys, kvmlite.cli.kernel; sys.exit(any(name.startswith('kvmlite.images') for name in sys.modules))"
    path = {**os.environ, "PYTHONPATH": str(Path(kvmlite.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=path, check=False).returncode == 0
