"""``kvmlite volume``, as a shell sees it."""

from __future__ import annotations

import json

from support.command import Command


def test_a_volume_is_made_resized_listed_and_removed(kvmlite: Command) -> None:
    assert kvmlite("volume", "create", "data", "10G").stdout == b"data  raw  10G\n"
    assert kvmlite("volume", "resize", "data", "12G").stdout == b"data  raw  12G\n"
    shown = json.loads(kvmlite("volume", "show", "--json", "data").stdout)
    assert shown == {
        "name": "data", "path": f"{kvmlite.home}/volumes/data.raw", "format": "raw", "size": 12 << 30, "allocated": 0,
        "in_use": False,
    }  # fmt: skip
    assert json.loads(kvmlite("volume", "ls", "--json").stdout) == [shown]
    assert kvmlite("volume", "ls").stdout.decode().split() == [
        "NAME", "FORMAT", "SIZE", "ON", "DISK", "IN", "USE", "data", "raw", "12G", "0", "no",
    ]  # fmt: skip
    assert kvmlite("volume", "rm", "data").stdout == b"data\n"
    assert kvmlite("volume", "ls", "-q").stdout == b""


MISTAKES = {
    ("create", "data", "1G"): "there is a volume 'data' already; choose another name, or kvmlite volume rm data",
    ("create", "../x", "1G"): "'../x' cannot name a volume",
    ("create", "x", "10"): "SIZE '10' is less than 512 bytes; write a number with a unit: 512M, 10G",
    ("create", "x", "lots"): "SIZE 'lots' is not a size; write a number with a unit: 512M, 10G",
    ("create", "x", "1G", "--format", "iso"): "unknown disk format 'iso'; choose one of raw, qcow2",
    ("resize", "data", "1M"): "what lies behind would be lost; shrink the file system in it first",
    ("rm", "data", "dat"): "no volume 'dat'; did you mean data?",
}


def test_a_mistake_is_one_line_and_125_and_changes_nothing(kvmlite: Command) -> None:
    kvmlite("volume", "create", "data", "1G")
    before = kvmlite("volume", "ls", "--json").stdout
    for arguments, complaint in MISTAKES.items():
        ended = kvmlite("volume", *arguments)
        assert (ended.code, ended.stdout) == (125, b"")
        assert complaint in ended.complaint
    assert kvmlite("volume", "ls", "--json").stdout == before
