from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvmlite.errors import ConfigError, HostError, ImageError, UnsupportedError
from kvmlite.images.debian import describe_deb, fetch_file, find_package, is_package_name, unpack
from kvmlite.images.kernel_source import add_kernel
from kvmlite.images.store import KernelStore

APT_CACHE = """#!/bin/sh
case "$*" in
*"show --no-all-versions linux-image-cloud-amd64")
    printf 'Package: linux-image-cloud-amd64\\nVersion: 6.1.9-2\\nDepends: linux-image-%s (= 6.1.9-2)\\n' RELEASE ;;
*"show --no-all-versions linux-image-RELEASE=6.1.9-2")
    printf 'Package: linux-image-%s\\nVersion: 6.1.9-2\\nSize: 1500000\\nDepends: kmod, linux-base (>= 4.3~), a | b\\n more\\n\\nPackage: other\\n' RELEASE ;;
*"show --no-all-versions tool") printf 'Package: tool\\nVersion: 1\\n' ;;
*"show --no-all-versions loop") printf 'Package: loop\\nVersion: 1\\nDepends: loop\\n' ;;
"pkgnames linux-image") echo linux-image-cloud-amd64; echo linux-image-cloud-amd64-dbg ;;
"pkgnames base-") echo base-files ;;
pkgnames*) ;;
*) echo "E: No packages found" >&2; exit 100 ;;
esac
"""
APT_GET = """#!/bin/sh
for last; do :; done
test -z "$FAIL" || { echo "W: noise" >&2; echo "E: $FAIL" >&2; exit 100; }
echo "$last" > "${last%%=*}_1_amd64.deb"
"""
DPKG_DEB = """#!/bin/sh
case "$1" in
-x) test -s "$2" && cp -r TREE "$3" ;;
-f) grep -q deb "$2" || { echo "dpkg-deb: error: '$2' is not a Debian format archive" >&2; exit 2; }
    printf 'Package: linux-image-x\\nVersion: 1:2-3\\n' ;;
esac
"""


@pytest.fixture
def apt(home: Path, tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Package tools of a few lines in PATH; the package's tree lies in the path returned."""
    tree, bin_directory = images.package(tmp_path / "tree"), tmp_path / "bin"
    bin_directory.mkdir()
    for name, text in (("apt-cache", APT_CACHE), ("apt-get", APT_GET), ("dpkg-deb", DPKG_DEB)):
        (bin_directory / name).write_text(text.replace("RELEASE", images.RELEASE).replace("TREE", str(tree)))
        (bin_directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_directory}:/usr/bin:/bin")
    return tree


@pytest.mark.parametrize("text", ["linux-image-6.1.0-56-cloud-amd64", "linux-image-6.12.1+deb12-amd64=6.12~bpo-1:2"])
def test_package_names_are_told(text: str) -> None:
    assert is_package_name(text)


@pytest.mark.parametrize("text", ["", "-x", "a", "a b", "A-package", "name=", "--option=1", "a/b", "x;rm", "na\nme"])
def test_what_is_no_package_name_never_reaches_apt(text: str) -> None:
    assert not is_package_name(text)


def test_a_metapackage_is_followed_to_the_kernel(apt: Path, images: Any) -> None:
    found = find_package("linux-image-cloud-amd64", depends_prefix="linux-image-")
    assert (found.name, found.version, found.size) == (f"linux-image-{images.RELEASE}", "6.1.9-2", 1500000)


def test_a_package_is_added_without_being_installed(apt: Path, images: Any) -> None:
    store, lines = KernelStore(), []
    kernel = add_kernel(store, "linux-image-cloud-amd64", progress=lines.append)
    assert lines == [
        f"downloading linux-image-{images.RELEASE} 6.1.9-2 (1.5 MB)",
        f"unpacking linux-image-{images.RELEASE}",
    ]
    assert kernel.source == f"deb:linux-image-{images.RELEASE}=6.1.9-2"
    assert kernel.modules_dir is not None
    assert store.find("linux-image-cloud-amd64") == store.find(f"linux-image-{images.RELEASE}") == kernel
    assert sorted(os.listdir(os.path.dirname(kernel.path))) == ["config", "manifest.json", "modules", "vmlinuz"]


def test_a_deb_file_is_added(apt: Path, tmp_path: Path) -> None:
    (tmp_path / "k.deb").write_text("deb")
    assert add_kernel(KernelStore(), str(tmp_path / "k.deb")).source == "deb:linux-image-x=1:2-3"


def test_a_file_that_is_no_deb_is_refused(apt: Path, tmp_path: Path) -> None:
    (tmp_path / "k.deb").write_text("no")
    with pytest.raises(ImageError, match=r"k\.deb is not a Debian package: .*not a Debian format archive"):
        describe_deb(str(tmp_path / "k.deb"))


def test_a_package_without_a_kernel_is_refused_and_leaves_nothing(apt: Path, images: Any) -> None:
    os.unlink(apt / f"boot/vmlinuz-{images.RELEASE}")
    store = KernelStore()
    with pytest.raises(ImageError, match=r"package linux-image-.* 6\.1\.9-2 has no kernel: it has no kernel"):
        add_kernel(store, "linux-image-cloud-amd64")
    assert os.listdir(store.root) == []


def test_an_unknown_package_gets_a_suggestion(apt: Path) -> None:
    with pytest.raises(ConfigError, match="apt knows no package linux-image-clod-amd64") as caught:
        find_package("linux-image-clod-amd64")
    assert caught.value.hint == "did you mean linux-image-cloud-amd64?"


def test_metapackages_in_a_circle_end(apt: Path) -> None:
    with pytest.raises(ImageError, match="more than 4 metapackages"):
        find_package("loop", depends_prefix="loop")


def test_a_failed_download_is_one_line_and_leaves_nothing(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = KernelStore()
    monkeypatch.setenv("FAIL", "Failed to fetch x: Temporary failure resolving 'host'")
    with pytest.raises(
        HostError, match=r"^apt-get download failed: Failed to fetch x: Temporary failure resolving 'host'$"
    ):
        add_kernel(store, "linux-image-cloud-amd64")
    monkeypatch.setenv("FAIL", "Write error - write (28: No space left on device)")
    with pytest.raises(HostError, match=r"^apt-get download failed: No space left on device$") as caught:
        add_kernel(store, "linux-image-cloud-amd64")
    assert "KVMLITE_HOME" in caught.value.hint
    assert os.listdir(store.root) == []


def test_ctrl_c_ends_the_children_of_a_tool_too(apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dpkg-deb starts a tar: one that is left over would go on to write while its directory is removed."""
    import subprocess
    import time

    script = 'sh -c "echo \\$\\$ > %s; exec sleep 1000" & wait\n' % (tmp_path / "pid")
    (tmp_path / "bin/dpkg-deb").write_text("#!/bin/sh\n" + script)
    monkeypatch.setattr(
        subprocess.Popen, "communicate", _interrupt_when(tmp_path / "pid", subprocess.Popen.communicate)
    )
    deadline = time.monotonic() + 60
    with pytest.raises(KeyboardInterrupt):
        unpack("x.deb", str(tmp_path / "out"))
    while _is_running(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_ctrl_c_just_after_a_tool_has_ended_is_ctrl_c(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    calls, communicate = [], subprocess.Popen.communicate

    def interrupted(tool: Any, *_: Any) -> Any:
        calls.append(communicate(tool) if not calls else ("", ""))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return calls[0]

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_package("tool")
    assert len(calls) == 2


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _interrupt_when(path: Path, communicate: Any) -> Any:
    """Make the first call of ``communicate`` a Ctrl-C that comes when ``path`` has been written."""
    calls = []

    def interrupted(tool: Any, *_: Any) -> Any:
        calls.append(tool)
        if len(calls) > 1:
            return communicate(tool)
        while not path.exists() or not path.read_text().endswith("\n"):
            assert tool.poll() is None
        raise KeyboardInterrupt

    return interrupted


def test_a_host_without_apt_is_told_the_alternatives(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="no apt-cache on this host") as caught:
        add_kernel(KernelStore(), "linux-image-cloud-amd64")
    assert "/boot/vmlinuz" in caught.value.hint


def test_one_file_of_a_package_is_fetched(apt: Path, home: Path) -> None:
    (apt / "bin").mkdir()
    (apt / "bin/tool").write_text("tool")
    target = home / "tools/tool"
    fetch_file("tool", ("usr/bin/tool", "bin/tool"), str(target))
    assert target.read_text() == "tool"
    assert os.listdir(home / "tools") == ["tool"]
    with pytest.raises(ImageError, match="package tool 1 has none of bin/other"):
        fetch_file("tool", ("bin/other",), str(target))
