from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvmlite.errors import ConfigError
from kvmlite.images.cpio import CpioTree

TINY = (
    b"070701" b"00000001" b"000041ED" b"00000000" b"00000000" b"00000002" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000000" b"00000000" b"00000004" b"00000000" b"dev\0" b"\0\0"
    b"070701" b"00000002" b"00002180" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000005" b"00000001" b"0000000C" b"00000000" b"dev/console\0" b"\0\0"
    b"070701" b"00000003" b"000081ED" b"00000000" b"00000000" b"00000001" b"00000000" b"00000005"
    b"00000000" b"00000000" b"00000000" b"00000000" b"00000005" b"00000000" b"init\0" b"\0"
    b"hello" b"\0\0\0"
    b"070701" b"00000004" b"0000A1FF" b"00000000" b"00000000" b"00000001" b"00000000" b"00000005"
    b"00000000" b"00000000" b"00000000" b"00000000" b"00000003" b"00000000" b"sh\0" b"\0\0\0"
    b"/init" b"\0\0\0"
    b"070701" b"00000000" b"00000000" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000000" b"00000000" b"0000000B" b"00000000" b"TRAILER!!!\0" b"\0\0\0"
)  # fmt: skip


def tiny_tree() -> CpioTree:
    tree = CpioTree()
    tree.symlink("/sh", "/init")
    tree.file("/init", b"hello", 0o755)
    tree.device("/dev/console", 0o600, 5, 1)
    return tree


def test_a_tiny_tree_has_these_bytes() -> None:
    assert tiny_tree().to_bytes() == TINY


def test_the_order_of_adding_does_not_matter() -> None:
    tree = CpioTree()
    tree.directory("/dev")
    tree.device("/dev/console", 0o600, 5, 1)
    tree.file("/init", b"hello", 0o755)
    tree.symlink("/sh", "/init")
    assert tree.to_bytes() == TINY


def test_an_empty_tree_is_the_end_mark_alone() -> None:
    assert CpioTree().to_bytes() == TINY[-124:]


@pytest.mark.parametrize("size", range(5))
def test_every_size_is_padded_to_four_bytes(size: int) -> None:
    tree = CpioTree()
    tree.file("/f", b"x" * size)
    assert len(tree.to_bytes()) % 4 == 0


@pytest.mark.cpio
def test_cpio_reads_it_back(tmp_path: Path) -> None:
    done = subprocess.run(
        ["cpio", "-i", "--quiet"], input=tiny_tree().to_bytes(), cwd=tmp_path, capture_output=True, check=False
    )
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=tiny_tree().to_bytes(), capture_output=True, check=True)
    assert listed.stdout.split() == [b"dev", b"dev/console", b"init", b"sh"]
    assert (tmp_path / "init").read_bytes() == b"hello", done.stderr


@pytest.mark.parametrize(
    "path", ["init", "/", "//init", "/a//b", "/a/../b", "/./a", "/a/", "/a\0b", "", "/" + "x" * 4096]
)
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"path in the guest|plain path"):
        CpioTree().file(path, b"")


def test_a_file_may_be_given_once_only() -> None:
    tree = tiny_tree()
    with pytest.raises(ConfigError, match="/init is in the guest's initial file system twice"):
        tree.file("/init", b"other")


def test_nothing_lies_below_a_file() -> None:
    tree = tiny_tree()
    with pytest.raises(ConfigError, match="/init/x lies below /init, which is not a directory"):
        tree.file("/init/x", b"")


def test_a_directory_may_be_given_again_with_the_same_mode() -> None:
    tree = tiny_tree()
    tree.directory("/dev")
    with pytest.raises(ConfigError, match="twice"):
        tree.directory("/dev", 0o700)
