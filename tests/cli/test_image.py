"""``kvmlite image`` and what ``run`` says of images, as a shell sees them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Command

pytestmark = pytest.mark.ext4

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    (path / "etc").mkdir(parents=True)
    (path / "etc/motd").write_text("hello\n")
    return path


def test_an_image_is_imported_listed_shown_and_removed(kvmlite: Command, tree: Path) -> None:
    made = kvmlite("image", "import", "mine", tree, "--size", "64M")
    assert (made.code, made.stderr) == (0, "making the file system\n")
    name, digest, size = made.stdout.decode().split()
    assert (name, len(digest), size[-1] in "KM") == ("mine", 12, True)
    shown = json.loads(kvmlite("image", "show", "--json", digest).stdout)
    assert (shown["name"], shown["size"], shown["source"]) == ("mine", 64 << 20, str(tree))
    assert (shown["env"], shown["entrypoint"], shown["user"]) == ([], [], "")
    assert os.stat(shown["path"]).st_size == 64 << 20
    assert json.loads(kvmlite("image", "ls", "--json").stdout) == [shown]
    listed = kvmlite("image", "ls").stdout.decode().splitlines()
    assert [line.split()[:3] for line in listed] == [["NAME", "DIGEST", "SIZE"], ["mine", digest, "64M"]]
    assert kvmlite("image", "ls", "-q").stdout == b"mine\n"
    assert kvmlite("image", "rm", "mine").stdout == b"mine\n"
    assert kvmlite("image", "ls", "--json").stdout == b"[]\n"
    assert not os.path.exists(shown["path"])


MISTAKES = {
    ("image", "show", "debain"): "no image 'debain' in the store; the store is empty: kvmlite image import NAME SOURCE",
    ("image", "import", "a", "/nowhere"): "/nowhere: no such file or directory; give a directory, a tar, oci:DIR",
    ("image", "import", "a/b", "/etc"): "'a/b' cannot name an image; use letters",
    ("image", "import", "a", "/etc", "--size", "big"): "--size 'big' is not a size; write a number with a unit",
    ("run", "debain", "--", "ls"): "no image 'debain' in the store",
    ("run", "uname"): "a command goes behind --: kvmlite run -- uname",
    ("run", "ls", "x", "y"): "a command goes behind --: kvmlite run ls -- x y",
    ("run", "--keep", "a", "--", "ls"): "--keep is for an image, and none was named",
    ("run", "--entrypoint", "a", "--", "ls"): "--entrypoint is for an image, and none was named",
    ("run", "./nowhere.img", "--", "ls"): "./nowhere.img: no such disk image",
    ("run", "/etc", "--", "ls"): "/etc is a directory, not a disk image; --root boots into a directory",
    ("image", "import", "a", "/etc", "--size", "4"): "--size '4' is less than 512 bytes; write a number with a unit",
    ("run", "--bare", "--kernel", "/x", "-v", "a:/b"): "--volume means nothing with --bare",
    ("run", "--bare", "--kernel", "/x", "debian"): "--bare boots the guest as it is and takes no image",
}


def test_a_mistake_is_one_line_and_125(kvmlite: Command) -> None:
    for arguments, complaint in MISTAKES.items():
        ended = kvmlite(*arguments)
        assert (ended.code, ended.stdout) == (125, b"")
        assert complaint in ended.complaint


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that other users may enter; nobody but its owner may enter pytest's."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="kvmlite-test-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.mark.root
@pytest.mark.fakeroot
def test_an_ordinary_user_gets_the_owners_of_a_tar(open_directory: Path) -> None:
    kvmlite = Command(open_directory)
    kvmlite.home.mkdir()
    os.chown(kvmlite.home, 65534, 65534)
    with tarfile.open(open_directory / "a.tar", "w") as tar:
        for name, mode, uid in (("locked", 0, 1000), ("program", 0o4755, 0)):
            info = tarfile.TarInfo(name)
            info.mode, info.uid, info.gid, info.size = mode, uid, 42, 4
            tar.addfile(info, io.BytesIO(b"data"))
    made = kvmlite("image", "import", "-q", "mine", open_directory / "a.tar", prefix=AS_NOBODY)
    assert (made.code, made.stdout, made.stderr) == (0, b"mine\n", "")
    assert kvmlite.remains() == []
    path = json.loads(kvmlite("image", "show", "--json", "mine").stdout)["path"]
    debugfs = shutil.which("debugfs", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    assert debugfs
    rows = subprocess.run([debugfs, "-R", "ls -p /", path], check=True, capture_output=True, text=True).stdout.split()
    assert {row.split("/", 2)[2] for row in rows if "locked" in row or "program" in row} == {
        "100000/1000/42/locked/4/", "104755/0/42/program/4/",
    }  # fmt: skip
