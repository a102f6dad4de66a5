from __future__ import annotations

import os

import pytest

from kvmlite.boot.initrd import open_initrd
from kvmlite.errors import ConfigError, ImageError


def test_parts_follow_each_other_on_multiples_of_four(tmp_path, memory):
    (tmp_path / "a").write_bytes(b"12345")
    with open_initrd([tmp_path / "a", b"xyz", str(tmp_path / "a")]) as initrd:
        assert initrd.size == 8 + 4 + 5
        gpa = initrd.place(memory, floor=0x100000, limit=0x80000000)
        initrd.load(memory, gpa)
    assert gpa == 0x1FFF000
    assert memory.read(gpa, 18) == b"12345\0\0\0xyz\x0012345\0"


def test_place_skips_ram_above_4_gib(make_memory):
    memory = make_memory(layout=[(0, 2 << 20), (1 << 32, 64 << 20)])
    with open_initrd(b"x" * 100) as initrd:
        assert initrd.place(memory, floor=0x100000, limit=0x80000000) == 0x1FF000


def test_place_refuses_to_touch_the_kernel(make_memory):
    with open_initrd(b"x" * 4097) as initrd:
        memory = make_memory(2)
        assert initrd.place(memory, floor=0x1FE000, limit=0x80000000) == 0x1FE000
        with pytest.raises(ConfigError, match=r"initrd \(4.001 KiB of bytes\) of 4.001 KiB does not fit"):
            initrd.place(memory, floor=0x1FE001, limit=0x80000000)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match="cannot read the initrd: No such file or directory"):
        open_initrd(tmp_path / "none")


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ImageError, match="is an empty file"):
        open_initrd(tmp_path / "empty")


def test_directory_and_fifo_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(ImageError, match="is not a regular file"):
            open_initrd(path)


def test_nothing_is_refused():
    with pytest.raises(ImageError, match="given as bytes is empty"):
        open_initrd(b"")
    with pytest.raises(ImageError, match="list of initrds is empty"):
        open_initrd([])


def test_refusing_one_part_closes_the_others(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError):
        open_initrd([tmp_path / "a", tmp_path / "none"])
    assert len(os.listdir("/proc/self/fd")) == before
