from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path
from typing import Any

import pytest
import zstandard

from kvmlite.errors import ImageError, UnsupportedError
from kvmlite.images import module_file
from kvmlite.images.module_file import load_module, module_name, parse_modinfo


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("kernel/drivers/char/hw_random/virtio-rng.ko", "virtio_rng"),
        ("9p.ko.xz", "9p"),
        ("a/ext4.ko.zst", "ext4"),
        ("a/ext4.ko.gz", "ext4"),
        ("modules.dep", ""),
        ("a/ext4.ko.bz2", ""),
    ],
)
def test_the_name_is_what_lsmod_says(path: str, name: str) -> None:
    assert module_name(path) == name


def test_each_packing_is_told_by_its_first_bytes(tmp_path: Path, images: Any) -> None:
    plain = images.module("a")
    for packed in (plain, gzip.compress(plain), lzma.compress(plain)):
        (tmp_path / "m.ko").write_bytes(packed)
        assert load_module(str(tmp_path / "m.ko")) == plain


def test_zstd_is_unpacked_where_python_can(tmp_path: Path, images: Any) -> None:
    (tmp_path / "m.ko.zst").write_bytes(zstandard.compress(images.module()))
    assert load_module(str(tmp_path / "m.ko.zst")) == images.module()
    (tmp_path / "m.ko.zst").write_bytes(zstandard.compress(images.module())[:-9])
    with pytest.raises(ImageError, match=r"m\.ko\.zst is damaged: zstd"):
        load_module(str(tmp_path / "m.ko.zst"))


def test_zstd_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "m.ko.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(UnsupportedError, match="packed with zstd") as caught:
        load_module(str(tmp_path / "m.ko.zst"))
    assert "pip install zstandard" in caught.value.hint


def test_modinfo_gives_each_key_its_values(images: Any) -> None:
    info = parse_modinfo("m", images.module("a,b", softdep="pre: c"))
    assert info["depends"] == ("a,b",)
    assert info["softdep"] == ("pre: c",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"hello, world", "not an ELF object"),
        (lambda data: data[:40], "truncated after 40 bytes"),
        (lambda data: data[:-1], "section headers end at"),
        (lambda data: data[:100], "section headers end at"),
        (lambda data: lzma.compress(data)[:-20], "xz data ends early"),
        (lambda data: lzma.compress(data)[:30] + b"!" * 40, "xz: "),
        (lambda data: gzip.compress(data)[:-9], "gzip data ends early"),
        (lambda data: data[:18] + b"\xb7\0" + data[20:], "not an x86-64 relocatable object"),
        (lambda data: data[:0x28] + bytes(8) + data[0x30:], "section headers"),
        (lambda data: data[:0x28] + b"\xff" * 8 + data[0x30:], "section headers"),
    ],
)
def test_a_damaged_module_is_named_with_its_damage(tmp_path: Path, images: Any, change: Any, reason: str) -> None:
    (tmp_path / "m.ko").write_bytes(change(images.module()))
    with pytest.raises(ImageError, match=rf"m\.ko is damaged: .*{reason}") as caught:
        load_module(str(tmp_path / "m.ko"))
    assert "kvmlite kernel add" in caught.value.hint


def test_a_section_outside_the_file_is_damage(images: Any) -> None:
    data = bytearray(images.module())
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    struct.pack_into("<Q", data, sections + 64 + 0x18, 1 << 63)
    with pytest.raises(ImageError, match="a section ends at"):
        parse_modinfo("m.ko", bytes(data))


def test_a_small_file_cannot_unpack_to_more_than_the_limit(
    tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_file, "MAX_MODULE_SIZE", 1 << 20)
    for packed in (gzip.compress(bytes(2 << 20)), lzma.compress(bytes(2 << 20))):
        (tmp_path / "bomb.ko").write_bytes(packed)
        with pytest.raises(ImageError, match="unpacks to more than 1 MiB"):
            load_module(str(tmp_path / "bomb.ko"))


def test_a_module_of_another_kernel_is_refused(tmp_path: Path, images: Any) -> None:
    (tmp_path / "m.ko").write_bytes(images.module(release="5.10.0-1"))
    with pytest.raises(ImageError, match=r"m\.ko is built for kernel 5\.10\.0-1, not for 6\.1\.0"):
        load_module(str(tmp_path / "m.ko"), release="6.1.0")


def test_a_missing_module_file_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read module .*m\.ko: No such file"):
        load_module(str(tmp_path / "m.ko"))
