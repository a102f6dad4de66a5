"""The probe's arithmetic and its cache, without KVM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmlite.errors import UnsupportedError
from kvmlite.kvm import probe


class FileKvm:
    """A KVM whose descriptor is an ordinary file's: enough to be remembered by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1


@pytest.fixture
def kvm(tmp_path, monkeypatch):
    """A KVM that must not be measured, and an empty cache directory."""
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path / "home"))
    fake = FileKvm(tmp_path / "kvm")
    fake.path.touch()
    fake.fd = os.open(fake.path, os.O_RDWR)
    yield fake
    os.close(fake.fd)


@pytest.fixture
def measured(monkeypatch):
    """Speeds that ``ring0_speed`` returns one after the other; popping from an empty list fails the test."""
    speeds: list[float] = []
    monkeypatch.setattr(probe, "ring0_speed", lambda kvm: speeds.pop(0))
    return speeds


def cache_file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "cache" / "host"


def test_two_million_instructions_a_second_are_software(kvm, measured):
    measured.append(2e6)
    assert probe.is_software_kvm(kvm)


def test_an_emulated_amd_host_is_not_software_kvm(kvm, measured):
    measured.append(1e8)
    assert not probe.is_software_kvm(kvm)


def test_the_second_question_is_answered_from_the_cache(kvm, measured):
    measured.append(2e6)
    assert [probe.cached_ring0_speed(kvm), probe.cached_ring0_speed(kvm)] == [2e6, 2e6]


def test_refreshing_measures_again_and_replaces_the_cache(kvm, measured):
    measured += [2e6, 3e9]
    probe.cached_ring0_speed(kvm)
    probe.refresh_ring0_speed(kvm)
    assert probe.cached_ring0_speed(kvm) == 3e9


def test_the_cache_is_three_lines_of_text_and_leaves_no_draft(kvm, measured, tmp_path):
    measured.append(2034512.4)
    probe.cached_ring0_speed(kvm)
    lines = cache_file(tmp_path).read_text().splitlines()
    assert (lines[0], lines[2], len(lines)) == ("kvmlite-host 1", "ring0_speed 2034512", 3)
    assert lines[1].split()[1] == os.uname().release
    assert os.listdir(cache_file(tmp_path).parent) == ["host"]


def test_a_reloaded_kvm_module_is_measured_again(kvm, measured, tmp_path):
    measured += [2e6, 3e9]
    probe.cached_ring0_speed(kvm)
    node = os.open(tmp_path / "kvm2", os.O_RDWR | os.O_CREAT)  # loading the module makes a new node
    os.dup2(node, kvm.fd)
    os.close(node)
    assert probe.cached_ring0_speed(kvm) == 3e9


def test_another_boot_is_measured_again(kvm, measured, tmp_path):
    measured += [2e6, 3e9]
    probe.cached_ring0_speed(kvm)
    file = cache_file(tmp_path)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file.write_text(file.read_text().replace(boot_id, "0" * len(boot_id)))
    assert probe.cached_ring0_speed(kvm) == 3e9


@pytest.mark.parametrize(
    "last",
    [
        b"",
        b"ring0_speed",
        b"ring0_speed 0",
        b"ring0_speed -5",
        b"ring0_speed nan",
        b"ring0_speed 1e9",
        b"speed 5",
        b"ring0_speed 5\nmore",
        b"\xff\xfe",
        b"ring0_speed \xc2\xb2",
    ],
)
def test_wrong_content_is_ignored(kvm, measured, tmp_path, last):
    measured += [2e6, 3e9]
    probe.cached_ring0_speed(kvm)
    head = cache_file(tmp_path).read_bytes().splitlines(keepends=True)[:2]
    cache_file(tmp_path).write_bytes(b"".join(head) + last)
    assert probe.cached_ring0_speed(kvm) == 3e9


def test_a_directory_in_the_place_of_the_cache_is_tolerated(kvm, measured, tmp_path):
    measured += [2e6, 3e6]
    cache_file(tmp_path).mkdir(parents=True)
    assert [probe.cached_ring0_speed(kvm), probe.cached_ring0_speed(kvm)] == [2e6, 3e6]
    assert os.listdir(cache_file(tmp_path).parent) == ["host"]


def test_a_fifo_in_the_place_of_the_cache_does_not_block(kvm, measured, tmp_path):
    measured.append(2e6)
    cache_file(tmp_path).parent.mkdir(parents=True)
    os.mkfifo(cache_file(tmp_path))
    assert probe.cached_ring0_speed(kvm) == 2e6


def test_a_cache_directory_that_cannot_be_made_is_tolerated(kvm, measured, tmp_path):
    measured.append(2e6)
    (tmp_path / "home").write_text("a file")
    assert probe.cached_ring0_speed(kvm) == 2e6


def test_a_full_disk_costs_the_answer_nothing_and_leaves_no_draft(kvm, measured, tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(28, "No space left on device")

    measured.append(2e6)
    monkeypatch.setattr(probe.os, "write", full)
    assert probe.cached_ring0_speed(kvm) == 2e6
    assert os.listdir(cache_file(tmp_path).parent) == []


def test_refusal_says_how_slow_how_long_and_the_way_out(kvm, measured):
    measured.append(2e6)
    with pytest.raises(UnsupportedError) as caught:
        probe.refuse_software_kvm(kvm)
    assert str(caught.value) == (
        "this host's /dev/kvm is a software KVM: it emulates ring-0 code at 2.0 million instructions/s, "
        "so a stock kernel would need about 8 minutes to boot"
    )
    assert "nested virtualisation" in caught.value.hint
    assert "--force" in caught.value.hint


def test_hardware_is_not_refused(kvm, measured):
    measured.append(3e9)
    probe.refuse_software_kvm(kvm)
    assert measured == []


class TimedVcpu:
    """Stands for a vCPU: the time of each loop is made up."""


def test_one_run_that_lost_the_processor_makes_no_software_of_hardware(monkeypatch):
    calls = []

    def time_loop(vcpu, count):
        calls.append(count)
        stall = 10_000_000 if len(calls) == 5 else 0
        return 2_000 + count // 3 + stall  # 3 iterations/ns, 2 us to enter and leave

    monkeypatch.setattr(probe, "_time_loop", time_loop)
    assert 5.9e9 < probe._measure(TimedVcpu()) < 6.1e9


def test_a_slow_loop_is_not_lengthened(monkeypatch):
    calls = []

    def time_loop(vcpu, count):
        calls.append(count)
        return 20_000 + count * 4_000  # 2 instructions in 4 us

    monkeypatch.setattr(probe, "_time_loop", time_loop)
    assert 4.9e5 < probe._measure(TimedVcpu()) < 5.1e5
    assert max(calls) == 250
