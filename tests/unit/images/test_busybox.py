from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kvmlite.errors import HostError, ImageError, UnsupportedError
from kvmlite.images.busybox import applets, find_busybox, is_static


def program(*kinds: int, machine: int = 62) -> bytes:
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, 0, 64, 0, 0, 64, 56, len(kinds), 0, 0, 0
    )
    return header + b"".join([struct.pack("<I52x", kind) for kind in kinds])


def put(path: Path, data: bytes, mode: int = 0o755) -> str:
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (program(1), True),
        (program(1, 3), False),
        (program(1, machine=183), False),
        (program(), False),
        (program(1)[:-1], False),
        (b"#!/bin/sh\n", False),
        (b"", False),
    ],
)
def test_a_static_program_has_no_interpreter(tmp_path: Path, data: bytes, answer: bool) -> None:
    assert is_static(put(tmp_path / "p", data)) is answer


def test_what_cannot_be_run_is_no_program(tmp_path: Path) -> None:
    assert not is_static(put(tmp_path / "p", program(1), 0o644))
    assert not is_static(str(tmp_path / "missing"))
    assert not is_static(str(tmp_path))


def test_the_first_static_one_in_path_is_taken(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    put(tmp_path / "a/busybox", program(1, 3))
    put(tmp_path / "b/busybox", program(1))
    monkeypatch.setenv("PATH", f"{tmp_path}/a:{tmp_path}/b")
    assert find_busybox() == f"{tmp_path}/b/busybox"


def test_without_one_and_without_apt_the_package_is_named(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("kvmlite.images.busybox.is_static", lambda path: False)
    with pytest.raises(UnsupportedError, match="no statically linked busybox on this host") as caught:
        find_busybox()
    assert caught.value.hint == "apt install busybox-static"


def test_it_is_asked_for_its_names(tmp_path: Path) -> None:
    assert applets(put(tmp_path / "b", b"#!/bin/sh\necho usr/bin/wc; echo bin/sh\n")) == ("bin/sh", "usr/bin/wc")


@pytest.mark.parametrize("answer", ["/bin/sh", "../sh", ""])
def test_an_answer_that_is_no_path_is_refused(tmp_path: Path, answer: str) -> None:
    with pytest.raises(ImageError, match="--list-full names"):
        applets(put(tmp_path / "b", f"#!/bin/sh\necho '{answer}'\n".encode()))


def test_one_that_cannot_run_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot run"):
        applets(put(tmp_path / "b", b"\x7fELF"))
    with pytest.raises(HostError, match="--list-full failed"):
        applets(put(tmp_path / "c", b"#!/bin/sh\nexit 3\n"))
