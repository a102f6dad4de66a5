"""What a Linux guest may be given beside its kernel: a root disk, a shared directory, a network."""

from __future__ import annotations

import posixpath

from kvmlite.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
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

    class PlacedPart(GuestPart, Protocol):
        """One that is mounted somewhere in the guest."""

        @property
        def target(self) -> str:
            """Where: an absolute path."""


def in_order(parts: Iterable[PlacedPart]) -> tuple[PlacedPart, ...]:
    """Return mounts in the order that hides none of them: a directory comes before what is mounted below it.

    Raises:
        ConfigError: Two are to be at the same place, or one at the root.
    """
    by_place: dict[str, PlacedPart] = {}
    for part in parts:
        place = posixpath.normpath("/" + part.target.lstrip("/"))
        if place == "/":
            raise ConfigError("nothing can be mounted at / of a running guest", hint="--root boots into a directory")
        if place in by_place:
            raise ConfigError(f"two mounts at {place}: one would hide the other", hint="give each a place of its own")
        by_place[place] = part
    return tuple(by_place[place] for place in sorted(by_place, key=lambda place: place.count("/")))
