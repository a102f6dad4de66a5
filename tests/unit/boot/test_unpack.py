from __future__ import annotations

import errno
import hashlib
import os
import threading

import pytest

from kvmlite.boot import load_kernel, open_kernel, unpack
from kvmlite.errors import ImageError


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "home" / "cache"


def unpack_file(path, cache):
    with open_kernel(path) as image:
        return unpack.unpack(image, cache)


def test_first_start_unpacks_and_the_next_finds_it(save, build, cache):
    path = save(build.bzimage())
    with unpack_file(path, cache) as first:
        assert first.is_cached
        assert os.pread(first.fd, 10000, 0) == build.vmlinux()
    entry = cache / hashlib.sha256(build.bzimage()).hexdigest()
    before = entry.stat()
    with unpack_file(path, cache) as second:
        assert second.is_cached
        assert second.elf.entry == 0x1000000
    after = entry.stat()
    assert (after.st_ino, oct(after.st_mode)) == (before.st_ino, "0o100600")
    assert oct(cache.stat().st_mode & 0o777) == "0o700"


def test_without_a_cache_nothing_is_kept(save, build):
    with unpack_file(save(build.bzimage()), None) as vmlinux:
        assert not vmlinux.is_cached
        assert os.pread(vmlinux.fd, 10000, 0) == build.vmlinux()


def test_uncompressed_payload_is_cached_too(save, build, cache):
    payload = build.vmlinux()
    payload += len(payload).to_bytes(4, "little")
    path = save(build.bzimage(payload))
    unpack_file(path, cache).close()
    before = [entry.stat().st_ino for entry in cache.iterdir()]
    with unpack_file(path, cache) as vmlinux:
        assert os.pread(vmlinux.fd, 10000, 0) == build.vmlinux()
    assert [entry.stat().st_ino for entry in cache.iterdir()] == before


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"x" * 5000], ids=["empty", "short", "long"])
def test_damaged_entry_is_replaced(save, build, cache, damage):
    path = save(build.bzimage())
    unpack_file(path, cache).close()
    entry = cache / hashlib.sha256(build.bzimage()).hexdigest()
    entry.write_bytes(damage)
    with unpack_file(path, cache) as vmlinux:
        assert vmlinux.is_cached
    assert entry.read_bytes() == build.vmlinux()


def test_entry_of_the_right_size_that_is_no_elf_is_replaced(save, build, cache):
    path = save(build.bzimage())
    unpack_file(path, cache).close()
    entry = cache / hashlib.sha256(build.bzimage()).hexdigest()
    entry.write_bytes(bytes(len(build.vmlinux())))
    unpack_file(path, cache).close()
    assert entry.read_bytes() == build.vmlinux()


def test_entry_that_others_may_write_is_not_trusted(save, build, cache):
    path = save(build.bzimage())
    unpack_file(path, cache).close()
    entry = cache / hashlib.sha256(build.bzimage()).hexdigest()
    entry.chmod(0o666)
    unpack_file(path, cache).close()
    assert oct(entry.stat().st_mode & 0o777) == "0o600"


def test_symbolic_link_in_place_of_an_entry_is_not_followed(save, build, cache, tmp_path):
    cache.mkdir(parents=True)
    (tmp_path / "other").write_bytes(build.vmlinux())
    entry = cache / hashlib.sha256(build.bzimage()).hexdigest()
    entry.symlink_to(tmp_path / "other")
    with unpack_file(save(build.bzimage()), cache) as vmlinux:
        assert vmlinux.is_cached
    assert not entry.is_symlink()


def test_full_disk_does_not_keep_a_kernel_from_booting(save, build, cache, monkeypatch):
    def no_space(fd, data):
        if "memfd" not in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    real = os.write
    monkeypatch.setattr(os, "write", no_space)
    with unpack_file(save(build.bzimage()), cache) as vmlinux:
        assert not vmlinux.is_cached
        assert vmlinux.elf.entry == 0x1000000
    assert os.listdir(cache) == []


def test_cache_directory_that_cannot_be_made_does_not_keep_a_kernel_from_booting(save, build, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with unpack_file(save(build.bzimage()), tmp_path / "file" / "cache") as vmlinux:
        assert not vmlinux.is_cached


def test_many_starts_at_once_leave_one_whole_entry(save, build, cache):
    path = save(build.bzimage())
    found = []

    def start():
        with unpack_file(path, cache) as vmlinux:
            found.append(os.pread(vmlinux.fd, 10000, 0))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [build.vmlinux()] * 8
    assert [name for name in os.listdir(cache) if not name.startswith("stat-")] == [
        hashlib.sha256(build.bzimage()).hexdigest()
    ]


def test_alias_saves_reading_the_whole_file(save, build, cache, monkeypatch):
    monkeypatch.setattr(unpack, "_ALIAS_AGE_S", -3600.0)
    path = save(build.bzimage())
    unpack_file(path, cache).close()
    monkeypatch.setattr(hashlib, "sha256", None)
    with unpack_file(path, cache) as vmlinux:
        assert vmlinux.elf.entry == 0x1000000


def test_alias_is_not_made_for_a_file_just_written(save, build, cache, monkeypatch):
    monkeypatch.setattr(unpack, "_ALIAS_AGE_S", 3600.0)  # just now, on a busy host
    unpack_file(save(build.bzimage()), cache).close()
    assert not [name for name in os.listdir(cache) if name.startswith("stat-")]


def test_alias_of_a_file_changed_since_is_not_used(save, build, cache, monkeypatch):
    monkeypatch.setattr(unpack, "_ALIAS_AGE_S", -3600.0)
    path = save(build.bzimage())
    unpack_file(path, cache).close()
    other = build.bzimage(build.gzip_payload(build.vmlinux(b"\xcc" * 64)))
    with open(path, "wb") as file:
        file.write(other)
    with unpack_file(path, cache) as vmlinux:
        assert os.pread(vmlinux.fd, 10000, 0) == build.vmlinux(b"\xcc" * 64)


def test_alias_that_leads_out_of_the_cache_is_not_followed(save, build, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "_ALIAS_AGE_S", -3600.0)
    path = save(build.bzimage())
    unpack_file(path, cache).close()
    (alias,) = [name for name in os.listdir(cache) if name.startswith("stat-")]
    wrong = bytes(b ^ 1 if i > 300 else b for i, b in enumerate(build.vmlinux()))
    (tmp_path / "wrong").write_bytes(wrong)
    (cache / alias).unlink()
    (cache / alias).symlink_to(tmp_path / "wrong")
    with unpack_file(path, cache) as vmlinux:
        assert os.pread(vmlinux.fd, 10000, 0) == build.vmlinux()


def test_oldest_entries_and_their_aliases_are_dropped(save, build, cache, monkeypatch):
    monkeypatch.setattr(unpack, "_ALIAS_AGE_S", -3600.0)
    monkeypatch.setattr(unpack, "KEEP", 2)
    for number in range(4):
        path = save(build.bzimage(build.gzip_payload(build.vmlinux(bytes([number]) * 64))))
        unpack_file(path, cache).close()
        for name in os.listdir(cache):
            if not name.startswith("stat-"):
                os.utime(cache / name, (1000 + number, 1000 + number))
    names = os.listdir(cache)
    assert sorted(name.startswith("stat-") for name in names) == [False, False, True, True]


def test_leftover_of_a_killed_writer_is_dropped(save, build, cache):
    cache.mkdir(parents=True)
    (cache / ".new-1-old").write_bytes(b"half")
    os.utime(cache / ".new-1-old", (1, 1))
    (cache / ".new-2-young").write_bytes(b"half")
    unpack_file(save(build.bzimage()), cache).close()
    assert [name for name in sorted(os.listdir(cache)) if name.startswith(".new")] == [".new-2-young"]


def test_payload_that_is_no_elf_is_refused(save, build, cache):
    with pytest.raises(ImageError, match=r"is no ELF \(starts with 68 65 6c 6c"):
        unpack_file(save(build.bzimage(build.gzip_payload(b"hello" * 100))), cache)


def test_unknown_compression_is_left_to_the_guest(save, build, memory):
    with open_kernel(save(build.bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(100)))) as image:
        assert load_kernel(memory, image).rip == 0x1000200
