"""A machine that the host cannot give everything it wants: the caller is told, and gets all back."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support.machines import bare_config
from support.shortage import Kind, of_anything, of_descriptors, shortages

from kvmlite import Console, Disk, Net, Pmem, Rng, Vsock
from kvmlite.devices.net.ports import StreamBackend
from kvmlite.machine import Machine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("mappings")]


@pytest.mark.parametrize("kind", [of_descriptors, of_anything])
def test_a_machine_that_lacks_something_leaves_nothing(
    kind: Kind, assemble: Callable[[str], Path], tmp_path: Path
) -> None:
    kernel = assemble("1: jmp 1b")
    image, memory = tmp_path / "image", tmp_path / "memory"
    for path in (image, memory):
        path.write_bytes(bytes(1 << 20))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        devices = (
            Rng(), Console(), Vsock(uds_path=str(tmp_path / "vsock")), Disk(path=str(image), queues=2, iops=100, engine="sync"),
            Pmem(path=str(memory), mode="shared"), Net(backend=StreamBackend(ours.fileno()), packets=100),
        )  # fmt: skip
        config = bare_config(kernel, vcpu_count=2, devices=devices, memory_backing="memfd", agent_serial=True)
        for shortage in shortages(kind):
            with shortage, Machine(config) as machine:
                machine.start()
            assert not (tmp_path / "vsock").exists()
