"""What a virtio device is, seen from its transport, and what the machine hands a device."""

from __future__ import annotations

from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol, TypeGuard

    from kvmlite.host.loop import DeviceLoop
    from kvmlite.memory.guest_memory import GuestMemory
    from kvmlite.virtio.queue import Virtqueue

    class Interrupt(Protocol):
        """A device's way to tell its driver something. Any thread; does nothing while the driver is not up."""

        def share(self) -> int:
            """Return an irqfd for the host's kernel or another process, which serves the queues from now on.

            The interrupt status then always shows the queue bit: nobody sets it for them. It stays the machine's; the
            same each time. Thread: a vCPU's, in ``activate``.
            """

        @property
        def native(self) -> Any:
            """``struct kvl_irq *``, for a worker in C."""

        def raise_queue(self) -> None:
            """Say that buffers were used. Ask the queue's ``needs_interrupt()`` first."""

        def raise_config(self, update: Callable[[], None] | None = None) -> None:
            """Say that configuration space changed.

            Args:
                update: Makes the change. No driver then reads one half before and the other after it without noticing
                    (VIRTIO 1.2, 2.5.1). Must not block.
            """

    class MapMemory(Protocol):
        """Puts memory of this process into the guest's address space, above its RAM."""

        def __call__(self, hva: int, size: int, *, read_only: bool) -> int:
            """Return the guest-physical address, a multiple of 1 GiB.

            The memory has to stay mapped until the device's ``close``. It is no RAM: neither a memory map nor
            ``GuestMemory`` lists it, so no device reads or writes it.

            Args:
                hva, size: Where it is mapped here; both multiples of 2 MiB.
                read_only: What the guest writes goes nowhere.

            Raises:
                KvmError: KVM refuses.
            """

    class VirtioDevice(Protocol):
        """A device behind a transport. The transport makes sure of the order of calls.

        A driver's mistake is ``GuestFault``: raise it from ``activate``, ``write_config`` or ``process_queue`` (``LoopDevice``)
        and the device ends in DEVICE_NEEDS_RESET. Any other exception ends the machine.
        """

        @property
        def device_id(self) -> int:
            """Device type (VIRTIO 1.2, chapter 5)."""

        @property
        def name(self) -> str:
            """How messages call it."""

        @property
        def queue_sizes(self) -> tuple[int, ...]:
            """Largest size of each queue: powers of two."""

        @property
        def queues_elsewhere(self) -> bool:
            """The queues are served by a C worker, the host's kernel or another process; else it is a ``LoopDevice``.

            The transport then leaves their kick eventfds alone.
            ``reset`` returns only when nobody touches the queues any more.
            """

        @property
        def device_features(self) -> int:
            """The device's own feature bits; the transport adds VERSION_1, EVENT_IDX and INDIRECT_DESC.

            A device whose queues another process serves has the attribute ``transport_features``: those of the three
            that the process can do, instead of all.
            """

        def read_config(self, offset: int, size: int) -> bytes:
            """Return configuration space; missing bytes read as 0. Thread: a vCPU's; must not block."""

        def write_config(self, offset: int, data: bytes) -> None:
            """Store the driver's write. Thread: a vCPU's; must not block."""

        def activate(self, queues: tuple[Virtqueue, ...], interrupt: Interrupt, driver_features: int) -> None:
            """Start work: the driver is up. Queues it did not set up are there but never yield a chain.

            Thread: a vCPU's.
            """

        def reset(self) -> None:
            """Forget the driver; touch no queue afterwards. Thread: a vCPU's."""

        def close(self) -> None:
            """Give back what the device holds of the host. Once; vCPUs and the device loop have stopped."""

    class LoopDevice(VirtioDevice, Protocol):
        """A device that serves its queues on the device loop; ``queues_elsewhere`` is False."""

        def process_queue(self, index: int) -> None:
            """Serve queue ``index``: the driver added buffers, or the last visit did not get to the end.

            Thread: the device loop; not before ``activate`` has returned, and not during ``reset``.
            """


def is_served_on_loop(device: VirtioDevice) -> TypeGuard[LoopDevice]:
    """Whether the transport has to see to the queues of a device."""
    return not device.queues_elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceResources:
    """What a device may have of its machine.

    Attributes:
        memory: Guest RAM.
        loop: The thread its queues are served on.
        name: How messages call the device, unique in the machine.
        warn: Tells the user, in one sentence, of something that does not end the machine: a disk that fails, a daemon
            that died. Any thread; does not block. Say each thing once.
        on_error: Told of an exception that is not the guest's fault on a thread of the device's own: the machine ends.
        map_memory: Maps memory of the device's own into the guest. In ``attach`` only.
    """

    memory: GuestMemory
    loop: DeviceLoop
    name: str
    warn: Callable[[str], None]
    on_error: Callable[[BaseException], None]
    map_memory: MapMemory


def read_config_bytes(config: bytes, offset: int, size: int) -> bytes:
    """Answer a read of configuration space: ``size`` bytes at ``offset``, zeros beyond its end."""
    return config[offset : offset + size].ljust(size, b"\0")
