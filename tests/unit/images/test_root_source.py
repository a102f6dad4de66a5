from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmlite.errors import ConfigError, HostError, ImageError, UnsupportedError
from kvmlite.images.image import ImageConfig
from kvmlite.images.image_store import ImageStore
from kvmlite.images.root_source import import_image
from kvmlite.images.tool import find_tool

pytestmark = pytest.mark.ext4


@pytest.fixture
def store(home: Path) -> ImageStore:
    return ImageStore()


def debugfs(disk: str, request: str) -> str:
    tool = find_tool("debugfs")
    assert tool
    return subprocess.run([tool, "-R", request, disk], check=True, capture_output=True, text=True).stdout


def listing(disk: str, directory: str = "/") -> dict[str, tuple[str, int, int]]:
    """Octal mode, uid and gid by name."""
    rows = [line.strip().strip("/").split("/") for line in debugfs(disk, f"ls -p {directory}").splitlines() if line]
    return {row[4]: (row[1], int(row[2]), int(row[3])) for row in rows if row[4] not in (".", "..", "lost+found")}


Member = tuple[str, dict[str, Any], bytes]


def make_tar(path: Path, members: list[Member], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o755}
USUAL: list[Member] = [
    ("./etc", DIRECTORY, b""),
    ("./etc/passwd", {}, b"root:x:0:0:root:/root:/bin/sh\n"),
    ("./etc/shadow", {"mode": 0o640, "gid": 42}, b"root:*:1:0:99999:7:::\n"),
    ("./home", DIRECTORY, b""),
    ("./home/joe", {"type": tarfile.DIRTYPE, "mode": 0o700, "uid": 1000, "gid": 1001}, b""),
    ("./home/joe/locked", {"mode": 0, "uid": 1000, "gid": 1001}, b"secret"),
    ("./sudo", {"mode": 0o4755}, b"#!"),
    ("./run", {"type": tarfile.SYMTYPE, "linkname": "/var/run"}, b""),
]  # fmt: skip


def test_a_tar_becomes_a_file_system_with_its_owners_and_modes(store: ImageStore, tmp_path: Path) -> None:
    image = import_image(store, "first", str(make_tar(tmp_path / "a.tar", USUAL)))
    root = listing(image.path)
    assert root["sudo"] == ("104755", 0, 0)
    assert root["run"][0] == "120777"
    assert listing(image.path, "/etc")["shadow"] == ("100640", 0, 42)
    assert listing(image.path, "/home")["joe"] == ("040700", 1000, 1001)
    assert listing(image.path, "/home/joe")["locked"] == ("100000", 1000, 1001)
    assert debugfs(image.path, "cat /home/joe/locked") == "secret"
    tool = find_tool("e2fsck")
    assert tool
    assert subprocess.run([tool, "-fn", image.path], check=False, capture_output=True).returncode == 0


def test_an_image_is_thin_private_and_as_large_as_asked(store: ImageStore, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", USUAL)
    image = import_image(store, "first", str(tar))
    found = os.stat(image.path)
    assert 1 << 30 < image.size < 1100 << 20
    assert image.size == found.st_size
    assert found.st_blocks * 512 < 4 << 20
    assert found.st_mode & 0o777 == 0o600
    assert import_image(store, "large", str(tar), size=8 << 30).size == 8 << 30


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2"])
def test_a_compressed_tar_is_told_by_its_bytes(store: ImageStore, tmp_path: Path, suffix: str) -> None:
    image = import_image(store, "x", str(make_tar(tmp_path / "no-suffix", USUAL, f"w:{suffix}")))
    assert "sudo" in listing(image.path)


def test_a_missing_decompressor_is_named(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmlite.images.root_source.find_tool", lambda name: None)
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(UnsupportedError, match="no zstd on this host") as caught:
        import_image(store, "x", str(tmp_path / "a.tar.zst"))
    assert caught.value.hint == "apt-get install zstd"


def test_a_directory_becomes_a_file_system(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/motd").write_text("hello\n")
    os.link(tmp_path / "tree/etc/motd", tmp_path / "tree/same")
    os.mkfifo(tmp_path / "tree/fifo")
    (tmp_path / "tree/odd name\t\u00e9").symlink_to("etc/motd")
    image = import_image(store, "d", str(tmp_path / "tree"))
    assert set(listing(image.path)) == {"etc", "same", "fifo", "odd name\t\u00e9"}
    assert debugfs(image.path, "cat /same") == "hello\n"
    assert image.source == str(tmp_path / "tree")


HOSTILE: dict[str, list[Member]] = {
    "climbs up": [("../../evil", {}, b"x")],
    "climbs up inside": [("etc/../../../evil", {}, b"x")],
    "absolute": [("{outside}/evil", {}, b"x")],
    "through an absolute link": [
        ("link", {"type": tarfile.SYMTYPE, "linkname": "{outside}"}, b""),
        ("link/evil", {}, b"x"),
    ],
    "through a relative link": [
        ("link", {"type": tarfile.SYMTYPE, "linkname": "../../../../../../../../../..{outside}"}, b""),
        ("link/evil", {}, b"x"),
    ],
    "through a link to a file": [
        ("evil", {"type": tarfile.SYMTYPE, "linkname": "{outside}/victim"}, b""),
        ("evil", {}, b"overwritten"),
    ],
    "hard link to a file outside": [
        ("evil", {"type": tarfile.LNKTYPE, "linkname": "{outside}/victim"}, b""),
        ("evil", {"mode": 0o777}, b"overwritten"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_writes_nothing_outside(store: ImageStore, tmp_path: Path, case: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("as it was")
    members = [
        (
            name.format(outside=outside),
            {k: v.format(outside=outside) if k == "linkname" else v for k, v in f.items()},
            d,
        )
        for name, f, d in HOSTILE[case]
    ]
    names = {path.name for path in tmp_path.iterdir()} | {"a.tar", "home"}
    tar = make_tar(tmp_path / "a.tar", members)
    with contextlib.suppress(ImageError):  # some are refused; of others the path is cut off
        import_image(store, "evil", str(tar))
    assert {path.name for path in tmp_path.iterdir()} == names
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("victim", "as it was")]
    assert not [name for name in os.listdir(store.root) if name.startswith(".staging")]


def test_a_truncated_tar_is_refused_and_leaves_nothing(store: ImageStore, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("big", {}, bytes(100_000))])
    tar.write_bytes(tar.read_bytes()[:50_000])
    with pytest.raises(ImageError, match=r"tar refuses .*Unexpected EOF"):
        import_image(store, "x", str(tar))
    assert store.images() == ()
    assert set(os.listdir(store.root)) <= {".lock", "names"}


def test_files_that_do_not_fit_are_refused(store: ImageStore, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("big", {}, os.urandom(3 << 20))])
    with pytest.raises(ConfigError, match=r"the files take . MiB, more than the 2 MiB"):
        import_image(store, "x", str(tar), size=2 << 20)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/place", "no such file or directory"),
        ("docker://alpine", "no such file or directory"),
        ("/dev/null", "neither a directory nor a file"),
        ("debian:", "no Debian suite"),
        ("debian:--help", "no Debian suite"),
        ("debian:../x", "no Debian suite"),
    ],
)
def test_what_is_no_source_is_refused(store: ImageStore, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_image(store, "x", source)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("docker://alpine", "skopeo copy docker://alpine oci:DIR:latest, then give oci:DIR"),
        ("debian", "write debian:bookworm, debian:trixie"),
    ],
)
def test_what_was_most_likely_meant_is_said(store: ImageStore, source: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_image(store, "x", source)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a tar" * 1000, r"tar refuses .*/disk.img: This does not look like a tar archive$"),
        (bytes(1 << 20), r"disk.img has no files in it$"),
    ],
)
def test_a_disk_image_is_no_tar(store: ImageStore, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "disk.img").write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        import_image(store, "x", str(tmp_path / "disk.img"))
    assert caught.value.hint == "a disk image needs no import: kvmlite run ./FILE"
    assert store.images() == ()


@pytest.mark.parametrize(("program", "package"), [("newuidmap", "uidmap"), ("fakeroot", "fakeroot")])
def test_what_an_ordinary_user_lacks_for_debian_is_named_before_anything_is_fetched(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("kvmlite.images.root_source.find_tool", lambda name: None if name == program else "/bin/true")
    with pytest.raises(UnsupportedError, match=f"no {program} on this host") as caught:
        import_image(store, "x", "debian:bookworm")
    assert f"apt-get install {package}" in caught.value.hint


def test_apts_own_complaint_is_told(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmdebstrap says what apt said before it says that apt failed, unless it is told to be quiet."""
    program = tmp_path / "bin/mmdebstrap"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\necho 'I: running apt-get update...' >&2\n"
        "case \"$*\" in *quiet*) ;; *) echo 'E: The repository has no Release file.' >&2 ;; esac\n"
        "echo 'E: apt-get update failed' >&2\nexit 25\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(HostError, match=r"^mmdebstrap bookworm failed: The repository has no Release file\.$"):
        import_image(store, "x", "debian:bookworm")


def test_debian_packages_are_names_and_for_debian_only(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no name of a Debian package"):
        import_image(store, "x", "debian:bookworm", packages=("-o=x",))
    with pytest.raises(ConfigError, match="are for debian:SUITE"):
        import_image(store, "x", str(tmp_path), packages=("curl",))


def test_a_full_disk_is_noticed_before_mmdebstrap_starts(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(os.statvfs("/"))
    values[4] = 1000
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    monkeypatch.setattr("kvmlite.images.root_source.run_tool", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(HostError, match="a Debian image takes 600: No space left on device"):
        import_image(store, "x", "debian:bookworm")
    assert not [name for name in os.listdir(store.root) if name.startswith(".staging")]


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "a b", "x" * 200])
def test_a_bad_name_is_refused_before_the_work(store: ImageStore, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an image"):
        import_image(store, name, "/no/such/place")


def test_a_taken_name_is_refused_unless_it_is_to_be_replaced(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    first = import_image(store, "x", str(tmp_path / "tree"))
    with pytest.raises(ConfigError, match="there is an image 'x' already"):
        import_image(store, "x", str(tmp_path / "tree"))
    (tmp_path / "tree/more").write_text("more")
    second = import_image(store, "x", str(tmp_path / "tree"), replace=True)
    assert store.find("x").digest == second.digest != first.digest
    assert store.find(first.digest[:8]).names == ()
    store.remove(store.find("x"))
    assert [image.digest for image in store.images()] == [first.digest]


@pytest.fixture
def oci_layout(tmp_path: Path) -> Callable[..., str]:
    """Make an OCI layout with one layer per list of members; its ``oci:`` source."""
    import hashlib

    def make(layers: list[list[Member]], config: dict[str, Any], **platform: str) -> str:
        layout = tmp_path / "layout"
        (layout / "blobs/sha256").mkdir(parents=True)

        def blob(data: bytes, kind: str) -> dict[str, Any]:
            digest = hashlib.sha256(data).hexdigest()
            (layout / "blobs/sha256" / digest).write_bytes(data)
            return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

        tars = [make_tar(tmp_path / f"layer{i}.tar", members).read_bytes() for i, members in enumerate(layers)]
        rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]}
        whole = {"architecture": "amd64", "os": "linux", **platform, "config": config, "rootfs": rootfs}
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob(json.dumps(whole).encode(), "config.v1+json"),
            "layers": [blob(tar, "layer.v1.tar") for tar in tars],
        }
        entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
        entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
        (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        return f"oci:{layout}:latest"

    return make


CONFIG = {"Env": ["PATH=/bin", "A=b"], "Entrypoint": ["/run.sh"], "Cmd": ["serve"], "WorkingDir": "/srv", "User": "joe"}


@pytest.mark.oci
def test_an_oci_layout_is_put_together_layer_by_layer(store: ImageStore, oci_layout: Callable[..., str]) -> None:
    upper: list[Member] = [
        ("etc/.wh.shadow", {}, b""),
        ("home/joe/.wh..wh..opq", {}, b""),
        ("home/joe/new", {"uid": 1000, "gid": 1001}, b"new"),
    ]
    image = import_image(store, "o", oci_layout([USUAL, upper], CONFIG))
    assert listing(image.path, "/etc") == {"passwd": ("100644", 0, 0), "hosts": ("100644", 0, 0)}
    assert debugfs(image.path, "cat /etc/hosts").startswith("127.0.0.1 localhost\n")
    assert listing(image.path, "/home/joe") == {"new": ("100644", 1000, 1001)}
    assert image.config == ImageConfig(
        env=("PATH=/bin", "A=b"), entrypoint=("/run.sh",), command=("serve",), workdir="/srv", user="joe"
    )
    assert store.find("o") == image


@pytest.mark.oci
def test_a_docker_archive_is_imported(store: ImageStore, oci_layout: Callable[..., str], tmp_path: Path) -> None:
    source, archive = oci_layout([USUAL], CONFIG), tmp_path / "a.tar"
    copy = ["skopeo", "--insecure-policy", "copy", "-q", source, f"docker-archive:{archive}:name:tag"]
    subprocess.run(copy, check=True, capture_output=True)
    image = import_image(store, "o", f"docker-archive:{archive}")
    assert listing(image.path)["sudo"] == ("104755", 0, 0)
    assert image.config.entrypoint == ("/run.sh",)


@pytest.mark.oci
def test_an_image_for_another_machine_is_refused(store: ImageStore, oci_layout: Callable[..., str]) -> None:
    with pytest.raises(ImageError, match="for linux on arm64"):
        import_image(store, "o", oci_layout([USUAL], CONFIG, architecture="arm64"))


@pytest.mark.oci
def test_a_layer_that_is_not_what_its_digest_says_is_refused(
    store: ImageStore, oci_layout: Callable[..., str], tmp_path: Path
) -> None:
    source = oci_layout([USUAL], CONFIG)
    layer = max((tmp_path / "layout/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    layer.write_bytes(layer.read_bytes()[:-1] + b"x")
    with pytest.raises(ImageError, match="cannot read oci:"):
        import_image(store, "o", source)


@pytest.mark.oci
def test_no_layout_is_one_line(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read oci:.*index\.json: no such file or directory"):
        import_image(store, "o", f"oci:{tmp_path}/nowhere")


@pytest.mark.oci
def test_a_layer_through_a_link_stays_inside(store: ImageStore, oci_layout: Callable[..., str], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link: list[Member] = [("link", {"type": tarfile.SYMTYPE, "linkname": str(outside)}, b"")]
    through: list[Member] = [("link/evil", {}, b"x"), ("link/.wh.victim", {}, b"")]
    (outside / "victim").write_text("as it was")
    with contextlib.suppress(ImageError):
        import_image(store, "o", oci_layout([link, through], CONFIG))
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("victim", "as it was")]


HOSTS = {
    "one of its own": ([("etc", DIRECTORY, b""), ("etc/hosts", {}, b"10.0.0.1 x\n")], b"10.0.0.1 x\n"),
    "a link": ([("etc", DIRECTORY, b""), ("etc/hosts", {"type": tarfile.SYMTYPE, "linkname": "{outside}"}, b"")], None),
    "a linked directory": ([("etc", {"type": tarfile.SYMTYPE, "linkname": "{outside}"}, b"")], None),
    "a fifo": ([("etc", DIRECTORY, b""), ("etc/hosts", {"type": tarfile.FIFOTYPE}, b"")], None),
    "a directory": ([("etc", DIRECTORY, b""), ("etc/hosts", DIRECTORY, b"")], None),
}  # fmt: skip


@pytest.mark.oci
@pytest.mark.parametrize("case", HOSTS)
def test_hosts_that_an_image_brings_are_left_alone(
    store: ImageStore, oci_layout: Callable[..., str], tmp_path: Path, case: str
) -> None:
    members, expected = HOSTS[case]
    outside = tmp_path / "outside"
    outside.mkdir()
    layer = [
        (name, {k: str(v).format(outside=outside) if k == "linkname" else v for k, v in fields.items()}, data)
        for name, fields, data in members
    ]
    image = import_image(store, "o", oci_layout([layer], CONFIG))
    assert list(outside.iterdir()) == []
    if expected is not None:
        assert debugfs(image.path, "cat /etc/hosts").encode() == expected


@pytest.mark.parametrize(
    "config",
    [[], {"Env": "A=b"}, {"Env": [1]}, {"Cmd": {"a": 1}}, {"WorkingDir": 3}, {"User": ["x"]}, {"Entrypoint": ["a\0b"]}],
)
def test_a_config_of_wrong_types_is_refused(config: object) -> None:
    with pytest.raises(ImageError, match="the image's config"):
        ImageConfig.from_json(config)


@pytest.mark.parametrize("config", [None, {}, {"Env": None, "Cmd": None, "User": ""}])
def test_an_empty_config_is_none(config: object) -> None:
    assert ImageConfig.from_json(config) == ImageConfig()


def test_what_is_run_is_the_entrypoint_and_the_command_as_docker_has_it() -> None:
    config = ImageConfig(entrypoint=("/e", "1"), command=("a", "b"))
    assert config.argv([]) == ["/e", "1", "a", "b"]
    assert config.argv(["x"]) == ["/e", "1", "x"]
    assert config.argv(["x"], entrypoint=["sh"]) == ["sh", "x"]
    assert config.argv([], entrypoint=["sh"]) == ["sh"]
    assert ImageConfig(command=("a",)).argv(["x"]) == ["x"]
