"""One input: a driver sets the device up, does its worst, and resets it. Whatever is wrong raises."""

from __future__ import annotations

import gc
import os
import traceback
from typing import TYPE_CHECKING

from fuzzkit.target import Op
from kvmlite._native import ffi, lib
from kvmlite.abi.virtio import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, DeviceStatus
from kvmlite.memory.guest_memory import GuestMemory
from kvmlite.testing import DriverQueue
from kvmlite.testing.loop import ManualLoop
from kvmlite.virtio.device import DeviceResources
from kvmlite.virtio.interrupt import DeviceInterrupt
from kvmlite.virtio.state import VirtioState

if TYPE_CHECKING:
    from fuzzkit.target import DeviceTarget
    from kvmlite.virtio.queue import Virtqueue
    from kvmlite.virtio.state import QueueSetup

HONEST_EVERY = 128  # cases
FILES_EVERY = 4096
_INITIALISED = int(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
_NEGOTIATED = _INITIALISED | int(DeviceStatus.FEATURES_OK)
_UP = _NEGOTIATED | int(DeviceStatus.DRIVER_OK)
_SILENT = 0xE0  # flags of a message
_PARTS = ("", "desc_gpa", "avail_gpa", "used_gpa")


class DeviceFuzzer:
    """The device of a target, in guest memory, behind the real state machine, on a loop that runs when told to.

    Args:
        target: Whose device.
    """

    def __init__(self, target: DeviceTarget) -> None:
        layout = [(0, lib.FUZZ_LOW_SIZE), (lib.FUZZ_HIGH_GPA, lib.FUZZ_HIGH_SIZE)]
        self.memory = GuestMemory(sum(size for _, size in layout), layout=layout)
        self.loop = ManualLoop()
        self.warnings: set[str] = set()
        self._errors: list[BaseException] = []
        self._target = target
        self.device = target.attach(self._resources())
        count = len(self.device.queue_sizes)
        self.state = VirtioState(
            self.device,
            self.memory,
            self.loop,
            interrupt=DeviceInterrupt(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)),
            show_status=lambda status: None,
            kick_eventfds=tuple(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)),
            on_error=self._errors.append,
        )
        self._op = ffi.new("struct fuzz_op *")
        self._setup = lib.fuzz_get_setup()
        self._cases = 0
        self._open_files = 0
        lib.fuzz_begin(self.memory.native, list(self.device.queue_sizes), count)

    def _resources(self) -> DeviceResources:
        return DeviceResources(
            memory=self.memory,
            loop=self.loop,  # type: ignore[arg-type]
            name="device0",
            warn=self.warnings.add,
            on_error=self._errors.append,
            map_memory=lambda hva, size, *, read_only: 1 << 32,
        )

    def run(self, argv: list[str]) -> int:
        """Be libFuzzer's program; returns its exit status, or exits."""
        ffi.def_extern(name="fuzz_case")(self._guarded_case)
        arguments = [ffi.new("char[]", argument.encode()) for argument in argv]
        gc.collect()
        gc.freeze()
        return int(lib.fuzz_run(len(arguments), ffi.new("char *[]", arguments)))

    def _guarded_case(self) -> int:
        try:
            self._case()
        except BaseException:
            traceback.print_exc()
            os.abort()  # libFuzzer keeps the input
        return 0

    def _case(self) -> None:
        self._start()
        op = self._op
        while kind := lib.fuzz_step(op):
            if kind == lib.FUZZ_KICK:
                self.state.notify(op.queue)
                self.loop.run()
            elif kind == lib.FUZZ_MESSAGE:
                self._offer_message()
            elif kind == lib.FUZZ_HOST:
                self._target.host(self._to_op())
                self.loop.run()
            elif kind == lib.FUZZ_CONFIG:
                self._access_config(op.index, op.value, op.flags)
            else:
                self._reset()
                self._target.end_case()
                self._start()
            if self._errors:
                raise self._errors[0]
        self._check_at_rest()
        self._reset()
        self._target.end_case()
        lib.fuzz_check_memory()
        self._cases += 1
        if self._cases % HONEST_EVERY == 0:
            self._serve_honest_driver()
        if self._cases % FILES_EVERY == 0:
            self._check_open_files()

    def _to_op(self) -> Op:
        op = self._op
        return Op(op.queue, op.index, op.flags, op.size, op.value)

    def _offer_message(self) -> None:
        data = self._target.message(self._to_op())
        lib.fuzz_offer(self._op, data, len(data))
        if self._op.flags & _SILENT != _SILENT:  # most messages are told of at once
            self.state.notify(self._op.queue)
            self.loop.run()

    def _access_config(self, offset: int, value: int, how: int) -> None:
        size = 1 << (how & 3)
        if how & 4:
            assert len(self.state.read_config(offset, size)) == size
        else:
            self.state.write_config(offset, value.to_bytes(8, "little")[:size])

    def _start(self) -> None:
        setup, state = self._setup, self.state
        wanted = state.device_features & ~setup.refused_features
        if not setup.event_idx:
            wanted &= ~(1 << VIRTIO_RING_F_EVENT_IDX)
        if not setup.indirect:
            wanted &= ~(1 << VIRTIO_RING_F_INDIRECT_DESC)
        self._negotiate(wanted)
        gpa = lib.FUZZ_DESC_GPA
        for index, queue in enumerate(state.queues):
            if not setup.absent_queues >> index & 1:
                self._set_up_queue(queue, setup.queue_sizes[index], gpa)
            gpa += lib.FUZZ_RINGS_SIZE
        if setup.part and setup.queue < len(state.queues):
            setattr(state.queues[setup.queue], _PARTS[setup.part], setup.gpa)
        self._go_up()

    def _set_up_queue(self, queue: QueueSetup, size: int, gpa: int) -> None:
        queue.size = size
        queue.desc_gpa, queue.avail_gpa = gpa, gpa + lib.FUZZ_AVAIL_OFFSET
        queue.used_gpa = gpa + lib.FUZZ_USED_OFFSET
        queue.is_ready = True

    def _negotiate(self, features: int) -> None:
        state = self.state
        state.write_status(_INITIALISED)
        state.write_features(0, features & 0xFFFFFFFF)
        state.write_features(1, features >> 32)
        state.write_status(_NEGOTIATED)
        assert state.status == _NEGOTIATED, f"features {features:#x} are refused"

    def _go_up(self) -> None:
        self.state.write_status(_UP)
        self.loop.run()

    def _check_at_rest(self) -> None:
        status = self.state.status
        assert status & ~int(DeviceStatus.NEEDS_RESET) == _UP, f"status is {status:#x}"
        for queue in self.state.dispatch.queues:
            if queue.is_stopped:
                continue
            in_flight = lib.fuzz_in_flight(queue.native)
            assert in_flight == queue.in_flight, f"queue {queue.index} counts {queue.in_flight} chains, not {in_flight}"
            if not queue.is_broken:
                self._check_served(queue, in_flight)

    def _check_served(self, queue: Virtqueue, in_flight: int) -> None:
        holds = self._target.holds
        held = holds[queue.index] if queue.index < len(holds) else 0
        assert in_flight <= held, f"queue {queue.index}: {in_flight} chains are not returned, {held} may be kept"

    def _reset(self) -> None:
        self.state.write_status(0)
        assert self.state.status == 0
        lib.fuzz_forget_queues()
        self.loop.run()
        if self._errors:
            raise self._errors[0]

    def _serve_honest_driver(self) -> None:
        lib.fuzz_clear_memory()
        index = self._target.honest_queue
        driver = DriverQueue(self.memory, size=16, base=lib.FUZZ_DESC_GPA, arena_size=0x4000)
        self._negotiate(self.state.device_features & ~(1 << VIRTIO_RING_F_EVENT_IDX))
        queue = self.state.queues[index]
        self._set_up_queue(queue, driver.size, driver.desc_gpa)
        queue.avail_gpa, queue.used_gpa = driver.avail_gpa, driver.used_gpa
        self._go_up()

        def kick() -> None:
            self.state.notify(index)
            self.loop.run()

        self._target.honest(driver, kick)
        assert self.state.status == _UP, f"an honest driver is not served: status is {self.state.status:#x}"
        self._reset()
        self._target.end_case()
        lib.fuzz_clear_memory()

    def _check_open_files(self) -> None:
        count = len(os.listdir("/proc/self/fd"))
        self._open_files = self._open_files or count
        assert count <= self._open_files, f"{count} descriptors are open, there were {self._open_files}"
