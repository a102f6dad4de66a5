from __future__ import annotations

import pytest

from kvmlite import ConfigError, HostRoot, Mount, SharedDirectory
from kvmlite.cli.mounts import parse_mount, parse_root


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        (".:/mnt", Mount(source=".", target="/mnt")),
        ("/a b:/mnt/a b:ro", Mount(source="/a b", target="/mnt/a b")),
        ("a:b:/mnt:rw", Mount(source="a:b", target="/mnt", mode="rw")),
        ("a:/mnt,a", Mount(source="a", target="/mnt,a")),
        ("a,b:/mnt:overlay,xattr,cache=always", Mount(source="a,b", target="/mnt", mode="overlay", xattr=True, cache="always")),
    ],
)  # fmt: skip
def test_a_mount_is_read(text: str, mount: Mount) -> None:
    assert parse_mount(text) == mount


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not of the form SRC:DST"),
        ("/src", "is not of the form SRC:DST"),
        (":/mnt", "is not of the form SRC:DST"),
        ("/src:mnt", "is not of the form SRC:DST"),
        ("/src:ro", "is not of the form SRC:DST"),
        ("/src:/mnt:rx", "is not of the form SRC:DST"),
        ("/src:/mnt:ro,fast", "'fast' means nothing"),
        ("/src:/mnt,rw", "the mode comes behind a colon, not a comma"),
        ("/src:/mnt,overlay,xattr", "the mode comes behind a colon, not a comma"),
        ("/src:/mnt:ro,cache=never", "unknown cache mode 'never'"),
    ],
)
def test_what_is_not_a_mount_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_mount(text)
    assert message in str(raised.value)


def test_each_mount_has_a_device_of_its_own() -> None:
    mounts = [
        Mount(source="/a", target="/b"),
        Mount(source="/a", target="/c"),
        Mount(source="/a", target="/b", mode="rw"),
    ]
    specs = [spec for mount in mounts for spec in mount.devices]
    assert all(isinstance(spec, SharedDirectory) for spec in specs)
    assert len({spec.tag for spec in specs}) == 3  # type: ignore[attr-defined]
    assert [spec.read_only for spec in specs] == [True, True, False]  # type: ignore[attr-defined]


def test_only_overlays_need_overlayfs_and_their_lower_directory_is_read_only() -> None:
    overlay = Mount(source="/a", target="/b", mode="overlay")
    assert overlay.features == ("fs", "overlay")
    assert overlay.devices[0].read_only  # type: ignore[attr-defined]
    assert Mount(source="/a", target="/b").features == ("fs",)


def test_the_root_is_the_hosts_or_a_directory() -> None:
    assert parse_root("host") == HostRoot()
    assert parse_root("/srv/debian") == HostRoot(path="/srv/debian")
    assert HostRoot().devices == (SharedDirectory(path="/", tag="kvmlite-root", hidden=("dev", "proc", "run", "sys")),)
    assert parse_root("./debian") == HostRoot(path="./debian")
    with pytest.raises(ConfigError, match="--root 'debian' is unknown") as caught:
        parse_root("debian")
    assert caught.value.hint == "write --root host, or for a directory --root ./debian"
