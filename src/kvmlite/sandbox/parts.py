"""What a Linux guest may be given beside its kernel: a root disk, a shared directory, a network."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from kvmlite.guest.agent import AgentClient
    from kvmlite.machine.config import DeviceSpec

    class GuestPart(Protocol):
        """Devices outside and, once the agent is up, steps inside.

        A part is a record: it holds nothing of the host. What its devices open, they give back when the machine ends.
        """

        @property
        def features(self) -> tuple[str, ...]:
            """What the guest's kernel needs for it: names of ``images.modules.FEATURES``."""

        @property
        def devices(self) -> tuple[DeviceSpec, ...]:
            """Its devices."""

        @property
        def needs_shared_memory(self) -> bool:
            """Another process serves a device of it: guest RAM has to be a memfd, or huge pages."""

        def set_up(self, agent: AgentClient, windows: Sequence[int]) -> None:
            """Do what is to be done inside. Once, on the thread that waits for the agent, parts in their order.

            Args:
                agent: The guest's.
                windows: Where the registers of each of its devices are in the guest: guest-physical addresses.

            Raises:
                GuestError: The agent could not.
            """
