"""vhost devices of the host's kernel: what is said where there are none. The rest needs one: tests/guest."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmlite.errors import HostError
from kvmlite.host import vhost
from kvmlite.host.vhost import VHOST_NET, Vhost


def test_a_host_without_it_is_told_which_module_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = str(tmp_path / "vhost-net")
    monkeypatch.setitem(vhost._MODULES, missing, "vhost_net")
    with pytest.raises(HostError, match=r"cannot open .*: No such file") as info:
        Vhost(missing)
    assert info.value.errno == errno.ENOENT
    assert info.value.hint == "sudo modprobe vhost_net"


def test_a_file_that_is_none_is_refused_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="/dev/null: VHOST_SET_OWNER") as info:
        Vhost("/dev/null")
    assert info.value.errno == errno.ENOTTY


@pytest.mark.vhost_net
def test_the_kernels_own_answers() -> None:
    device = Vhost(VHOST_NET)
    try:
        assert device.features() >> 32 & 1
        device.set_memory([(0, 1 << 20, 0x10000000)])
        with pytest.raises(HostError, match="VHOST_NET_SET_BACKEND"):
            device.set_net_backend(0, device.fd)
    finally:
        device.close()
        device.close()
