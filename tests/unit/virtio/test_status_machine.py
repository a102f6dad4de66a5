"""Random drivers against the register file: nothing raises, and the status keeps its rules."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.recorder_device import Recorder

from kvmlite.abi.virtio_mmio import MmioRegister
from kvmlite.testing import VirtioRig

INTERESTING = st.sampled_from(
    [0, 1, 2, 3, 4, 7, 8, 11, 15, 16, 0x40, 0x4F, 0x80, 0x8B, 0x10000, 0x10100, 0x30000020, 0x7FFFFFFF, 0xFFFFFFFF]
)
VALUES = INTERESTING | st.integers(0, 2**64 - 1)
OFFSETS = st.sampled_from([int(register) for register in MmioRegister]) | st.integers(0, 0x1010)
WIDTHS = st.sampled_from([1, 2, 4, 8]) | st.integers(0, 16)
LEGAL = {0, 1, 3, 11, 15}


class Registers(RuleBasedStateMachine):
    """One device, one driver without manners."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = VirtioRig(lambda resources: Recorder(resources.name))
        assert isinstance(self.rig.device, Recorder)
        self.recorder = self.rig.device

    def teardown(self) -> None:
        self.rig.close()

    @rule(offset=OFFSETS, size=WIDTHS, value=VALUES)
    def write(self, offset: int, size: int, value: int) -> None:
        self.rig.transport.write(offset, size, value)

    @rule(offset=OFFSETS, size=WIDTHS)
    def read(self, offset: int, size: int) -> None:
        assert 0 <= self.rig.transport.read(offset, size) < 1 << 64

    @rule(value=INTERESTING)
    def write_status(self, value: int) -> None:
        self.rig.driver.store(MmioRegister.STATUS, value)

    @rule()
    def negotiate(self) -> None:
        assert self.rig.driver.negotiate()

    @rule(index=st.integers(0, 2), size=INTERESTING, gpa=VALUES)
    def set_up_queue(self, index: int, size: int, gpa: int) -> None:
        store = self.rig.driver.store
        store(MmioRegister.QUEUE_SEL, index)
        store(MmioRegister.QUEUE_NUM, size)
        store(MmioRegister.QUEUE_DESC_LOW, gpa & 0xFFFFFFFF)
        store(MmioRegister.QUEUE_AVAIL_LOW, 0x11000)
        store(MmioRegister.QUEUE_USED_LOW, 0x12000)
        store(MmioRegister.QUEUE_READY, 1)

    @rule()
    def come_up(self) -> None:
        self.rig.driver.reset()
        for queue in self.rig.queues:
            queue.clear()
        self.rig.driver.start(self.rig.queues)

    @rule(index=st.integers(0, 3))
    def notify(self, index: int) -> None:
        self.rig.driver.notify(index)

    @rule(index=st.integers(0, 1), value=st.integers(0, 65535))
    def break_ring(self, index: int, value: int) -> None:
        self.rig.queues[index].set_avail_idx(value)

    @rule()
    def run_loop(self) -> None:
        self.rig.loop.run()

    @invariant()
    def keeps_the_rules(self) -> None:
        status = self.rig.transport.state.status
        steps = status & ~0xC0
        assert steps in LEGAL, f"status {status:#x} skips a step"
        assert not self.rig.errors
        activations = sum(1 for entry in self.recorder.log if entry[0] == "activate")
        resets = sum(1 for entry in self.recorder.log if entry[0] == "reset")
        assert activations - resets == int(self.rig.transport.state.is_active)
        if steps != 15:
            assert not self.rig.transport.state.is_active
            assert not status & 0x40
            assert self.rig.loop.watched == set()
            assert self.rig.transport.state.interrupt.status() == 0
        for setup in self.rig.transport.state.queues:
            assert steps in (11, 15) or (setup.size, setup.is_ready) == (0, False)


def test_no_sequence_of_register_accesses_raises_or_breaks_the_status() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    options: dict[str, Any] = {"max_examples": 60, "stateful_step_count": 30, "deadline": None, "derandomize": True}
    run_state_machine_as_test(
        Registers, settings=settings(**options, suppress_health_check=list(HealthCheck), database=None)
    )
