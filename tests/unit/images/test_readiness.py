"""Findings about kernels and tools, with a store and a PATH of our own."""

from __future__ import annotations

import pytest

from kvmlite.errors import ConfigError
from kvmlite.images import readiness


@pytest.fixture(autouse=True)
def empty_host(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()


def install(tmp_path, *names: str) -> None:
    for name in names:
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)


def test_an_empty_store_on_a_host_without_a_kernel_is_a_warning_with_the_command(monkeypatch):
    def nothing(name):
        raise ConfigError("no kernel to run: the store is empty", hint="kvmlite kernel add")

    monkeypatch.setattr(readiness, "resolve", nothing)
    found = readiness.kernels()
    assert (found.status, found.fix) == ("warn", "kvmlite kernel add")


def test_missing_apt_tools_are_named(tmp_path):
    install(tmp_path, "apt-get")
    found = readiness.apt()
    assert (found.status, found.seen) == ("info", "no apt-cache, dpkg-deb")


def test_apt_tools_in_path_are_enough(tmp_path):
    install(tmp_path, "apt-get", "apt-cache", "dpkg-deb")
    assert readiness.apt().status == "ok"


def test_without_busybox_and_apt_guests_get_no_shell(monkeypatch):
    monkeypatch.setattr(readiness, "is_static", lambda path: False)
    assert (readiness.busybox().status, readiness.busybox().meaning) == ("warn", "guests get no shell")


def test_without_busybox_apt_can_fetch_it(tmp_path, monkeypatch):
    install(tmp_path, "apt-get")
    monkeypatch.setattr(readiness, "is_static", lambda path: False)
    assert readiness.busybox().status == "info"


def test_a_static_busybox_in_path_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(readiness, "is_static", lambda path: path == str(tmp_path / "bin" / "busybox"))
    assert readiness.busybox().seen == f"{tmp_path}/bin/busybox is static"
