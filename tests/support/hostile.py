"""Chains that no honest driver would offer, for hypothesis to make up."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from kvmlite.abi.virtio import VRING_DESC, DeviceStatus
from kvmlite.testing import DriverQueue, VirtioRig

RAM_SIZE = 8 << 20  # of a VirtioRig
UP = 15

_ADDRESSES = st.one_of(
    st.integers(0x100000, RAM_SIZE - 1),
    st.sampled_from([0, 0x10000, RAM_SIZE - 1, RAM_SIZE, RAM_SIZE - 8, 0xC0000000, 0xD0000000, 1 << 32, 2**64 - 8]),
    st.integers(0, 2**64 - 1),
)
_SIZES = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 8, 10, 12, 16, 44, 64, 4096, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF]
) | st.integers(0, 2**32 - 1)
_FLAGS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7]) | st.integers(0, 0xFFFF)


@dataclass(frozen=True)
class HostileChains:
    """Descriptors and heads as they go into the rings.

    Attributes:
        descriptors: The first entries of the table: GPA, size, flags, next.
        heads: What is put into the available ring.
        payload: What lies at 1 MiB, where many buffers begin.
    """

    descriptors: list[tuple[int, int, int, int]]
    heads: list[int]
    payload: bytes

    def offer(self, queue: DriverQueue) -> None:
        """Write them into the rings, buffers that are readable filled."""
        queue.memory.write(0x100000, self.payload)
        for index, (gpa, size, flags, following) in enumerate(self.descriptors):
            queue.memory.write(queue.desc_gpa + 16 * index, VRING_DESC.pack(gpa, size, flags, following))
        for head in self.heads:
            queue.publish(head)


hostile_chains = st.builds(
    HostileChains,
    descriptors=st.lists(st.tuples(_ADDRESSES | st.just(0x100000), _SIZES, _FLAGS, st.integers(0, 17)), max_size=8),
    heads=st.lists(st.integers(0, 9) | st.integers(0, 0xFFFF), min_size=1, max_size=20),
    payload=st.binary(max_size=64) | st.binary(min_size=512, max_size=512),
)


def check_survives(rig: VirtioRig, index: int, chains: HostileChains) -> None:
    """Offer them to queue ``index``: the device asks for a reset or goes on, and a reset mends it."""
    rig.restart()
    chains.offer(rig.queues[index])
    rig.kick(index)
    assert rig.errors == []
    assert rig.driver.status in (UP, UP | DeviceStatus.NEEDS_RESET)
    rig.restart()
    assert rig.driver.status == UP
