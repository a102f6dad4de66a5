"""A microVM in this process: started, watched, and given back whole.

with Machine(config) as machine:
    machine.start()
    report = machine.wait(timeout_s=30)
"""

from __future__ import annotations

import _thread
import time

from kvmlite.errors import StateError
from kvmlite.host.eventfd import EventFd
from kvmlite.host.loop import DeviceLoop
from kvmlite.host.sink import ConsoleSink
from kvmlite.machine.builder import Builder, MachineEvents, Parts
from kvmlite.machine.lifecycle import PAUSED, RUNNING, STOPPED, Latch, Lifecycle
from kvmlite.machine.outcome import (
    Exited,
    Hung,
    PoweredOff,
    Reset,
    Stopped,
    TimedOut,
    TripleFault,
    VmmError,
)
from kvmlite.machine.run_loop import VcpuThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from kvmlite.kvm.prepared import PreparedVm
    from kvmlite.machine.config import MachineConfig
    from kvmlite.machine.outcome import ExitReport, Outcome

    DeviceT = TypeVar("DeviceT")

PAUSE_TIMEOUT_S = 5.0
HANG_CHECK_S = 0.7


class Machine:
    """One microVM.

    Any number may live in one process; none of them ends it, handles its signals (but for one real-time signal with
    an empty handler) or prints. Every method may be called from any thread. Leaving the ``with`` block stops the
    machine and gives back every descriptor, thread and mapping, also after an error.

    Args:
        config: What to build; checked already.
        prepared: A VM made ahead of time; taken over.
    """

    def __init__(self, config: MachineConfig, *, prepared: PreparedVm | None = None) -> None:
        self.config = config
        self.spans: dict[str, float] = {}
        self._prepared = prepared
        self._lifecycle = Lifecycle()
        self._parts = Parts()
        self._threads: list[VcpuThread] = []
        self._outcome: Outcome | None = None
        self._outcome_lock = _thread.allocate_lock()
        self._ended = Latch()
        self._on_end: list[Callable[[], None]] = []
        self._warnings: list[str] = []
        self._on_warning: Callable[[str], None] | None = None
        self._parts_lock = _thread.RLock()  # build, start and finish: what makes or gives back parts and threads
        self._report: ExitReport | None = None
        self._exits_seen = -1
        self._console_error: OSError | None = None
        self._loop = DeviceLoop(self._device_failed)
        try:
            self._cancel_output = EventFd()
        except BaseException:
            self._loop.stop()
            raise
        self._console = ConsoleSink(config.console_fd, self._cancel_output, self._console_broken)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def state(self) -> str:
        """``new``, ``ready``, ``running``, ``paused`` or ``stopped``."""
        return self._lifecycle.state

    def mark(self, stage: str) -> None:
        """Note that a named stage has been reached now; the first time counts."""
        self.spans.setdefault(stage, time.monotonic())

    def build(self) -> None:
        """Open KVM, make memory and devices, load the kernel. ``start`` does it if need be.

        Raises:
            ConfigError, ImageError, HostError, UnsupportedError: And nothing is left behind.
        """
        with self._parts_lock:
            self._lifecycle.go("build")
            self._build()

    def _build(self) -> None:
        prepared, self._prepared = self._prepared, None
        events = MachineEvents(
            on_poweroff=self._powered_off,
            on_reset=self._reset,
            on_debug_exit=self._debug_exit,
            on_device_error=self._device_failed,
            on_warning=self._warn,
        )
        try:
            builder = Builder(self.config, self._parts, self._loop, events)
            builder.build(self._console, self.mark, prepared)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Let it run; returns at once.

        Raises:
            StateError: It has been started before.
            Others: As ``build``.
        """
        with self._parts_lock:
            if self._lifecycle.state == "new":
                self.build()
            self._lifecycle.go("start")
            self._loop.start()
            self._threads = [
                VcpuThread(vcpu, self._parts.bus, on_end=self.end, on_shutdown=self._shut_down)
                for vcpu in self._parts.vcpus
            ]
            for thread in self._threads:
                thread.start()
            if self._outcome is not None:  # stopped before there were threads to tell
                for thread in self._threads:
                    thread.request_stop()

    def pause(self) -> None:
        """Stop every vCPU where it is; returns when they stand.

        Raises:
            StateError: It is not running, has ended, or a vCPU does not stand within 5 s (its console's reader
                blocks it).
        """
        if self.has_ended():
            raise StateError("cannot pause a machine that has ended")
        self._lifecycle.go("pause")
        parked = [thread.request_pause() for thread in self._threads]  # all first, then wait
        for latch in parked:
            if not latch.wait(PAUSE_TIMEOUT_S):
                self.resume()
                raise StateError(f"a vCPU did not pause within {PAUSE_TIMEOUT_S:g} s; is the console's reader blocked?")

    def resume(self) -> None:
        """Let the vCPUs go on.

        Raises:
            StateError: It is not paused.
        """
        self._lifecycle.go("resume")
        for thread in self._threads:
            thread.resume()

    def stop(self, detail: str = "") -> None:
        """End it now, as pulling the plug would; ``wait`` then reports ``Stopped`` unless it had ended by itself."""
        self.end(Stopped(detail=detail))

    def end(self, outcome: Outcome) -> None:
        """End it with this outcome; the first one counts. Does not wait.

        Output that the guest has written still goes to its readers, unless the outcome is that the caller has had
        enough (``Stopped``, ``TimedOut``): then what they do not take at once is dropped.
        """
        with self._outcome_lock:
            is_first = self._outcome is None
            if is_first:
                self._outcome = outcome
                self.mark("ended")
        for thread in self._threads:
            thread.request_stop()
        if isinstance(outcome, (Stopped, TimedOut)):
            self._give_up_output()
        self._ended.set()
        if is_first:
            for function in self._on_end:
                function()

    def _give_up_output(self) -> None:
        with self._outcome_lock:  # _finish closes it
            if self._cancel_output.fd >= 0:
                self._cancel_output.signal()
        if self._parts.agent_channel is not None:
            self._parts.agent_channel.give_up()

    def call_on_end(self, function: Callable[[], None]) -> None:
        """Call ``function`` once, as soon as an outcome is known, on whichever thread brings it. Before ``start``."""
        self._on_end.append(function)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its devices had to tell so far that did not end it, such as a disk that fails."""
        with self._outcome_lock:
            return tuple(self._warnings)

    def call_on_warning(self, function: Callable[[str], None]) -> None:
        """Call ``function`` with each warning, those so far included, on whichever thread brings it."""
        with self._outcome_lock:
            self._on_warning = function
            earlier = tuple(self._warnings)
        for text in earlier:
            function(text)

    def _warn(self, text: str) -> None:
        with self._outcome_lock:
            self._warnings.append(text)
            function = self._on_warning
        if function is not None:
            function(text)

    @property
    def boots_linux(self) -> bool:
        """Whether what has been built is a Linux kernel."""
        return self._parts.boots_linux

    def has_ended(self) -> bool:
        """Whether an outcome is known."""
        return self._ended.is_set

    def wait(self, timeout_s: float | None = None) -> ExitReport:
        """Wait for its end and until its console's reader has taken everything, give all back, say how it ended.

        Args:
            timeout_s: Seconds; None waits for ever. A reader that is slower loses the rest, as after ``stop``.

        Raises:
            TimeoutError: It still runs (and goes on running).
            StateError: It was never started.
        """
        if self._report is not None:
            return self._report
        if self._lifecycle.state not in (RUNNING, PAUSED, STOPPED):
            raise StateError(f"cannot wait for a machine that is {self.state}: start it first")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = HANG_CHECK_S if deadline is None else min(HANG_CHECK_S, deadline - time.monotonic())
            if self._ended.wait(left):
                return self._finish(deadline)
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the machine still runs after {timeout_s:g} s")
            self.check_hang()

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until an outcome is known; whether it is. Gives nothing back: ``wait`` does."""
        return self._ended.wait(timeout_s)

    def close(self) -> None:
        """Stop it if it runs and give everything back. Twice is harmless."""
        self.stop()
        self._finish()

    def console_tail(self) -> bytes:
        """The last 64 KiB the guest wrote to its first serial port."""
        return self._console.tail

    @property
    def loop(self) -> DeviceLoop:
        """The thread that serves this machine's devices; it runs from ``start`` until ``wait`` returns."""
        return self._loop

    def device(self, kind: type[DeviceT]) -> DeviceT:
        """The first device of a class, for its host side.

        Raises:
            KeyError: The machine has none.
        """
        for device in self._parts.devices.values():
            if isinstance(device, kind):
                return device
        raise KeyError(f"the machine has no {kind.__name__}")

    def take_agent_serial(self) -> int:
        """Host end of the second serial port, a socket, from now on the caller's."""
        channel = self._parts.agent_channel
        if channel is None:
            raise KeyError("the machine has no second serial port")
        return channel.take_host_fd()

    def hang_up_agent_serial(self) -> None:
        """Deliver what the second serial port still holds, then end its stream."""
        if self._parts.agent_channel is not None:
            self._parts.agent_channel.hang_up()

    def is_dead(self) -> str:
        """Why no vCPU can ever run again, or "" while at least one can. Any thread but a vCPU's; takes up to 1 s."""
        snapshots = [thread.inspect() for thread in self._threads]
        if not snapshots or not all(snapshot is not None and snapshot.is_dead for snapshot in snapshots):
            return ""
        halted = ", ".join(f"vCPU {i} at {s.rip:#x}" for i, s in enumerate(snapshots) if s and s.mp_state == 3)
        return f"every vCPU is halted with interrupts disabled ({halted})"

    def check_hang(self) -> None:
        """End the machine as ``Hung`` if no vCPU can ever run again. Looks closer only where nothing has exited since
        the last call; who waits in another way than ``wait`` calls it now and then."""
        exits = self._exit_count()
        if exits == self._exits_seen and self.state == RUNNING:
            reason = self.is_dead()
            if reason:
                self.end(Hung(detail=reason))
        self._exits_seen = self._exit_count()

    def _exit_count(self) -> int:
        return sum(int(thread.vcpu.stats.exits) for thread in self._threads)

    def _finish(self, deadline: float | None = None) -> ExitReport:
        """Join the threads, drain the console, count, close. Once; later callers get the same report."""
        with self._parts_lock:
            if self._report is not None:
                self._give_back()  # what an interrupted call has left
                return self._report
            if deadline is not None:
                self._console.give_up_at(deadline)
            if self._threads:
                self._parts.console.drain()  # a vCPU waits for the same reader: only then can it be joined
            self._give_up_output()
            stuck = [thread for thread in self._threads if not thread.join()]
            if stuck:
                raise StateError(f"vCPU {stuck[0].vcpu.vcpu_id} did not stop")
            self._loop.stop()
            self._report = self._make_report()
            self._give_back()
            return self._report

    def _give_back(self) -> None:
        """Close everything; twice is harmless."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.close()
        self._parts.close()
        with self._outcome_lock:
            self._cancel_output.close()
        if self._lifecycle.state != STOPPED:
            self._lifecycle.go("stop")

    def _make_report(self) -> ExitReport:
        from kvmlite.machine.outcome import ExitReport
        from kvmlite.machine.statistics import collect

        if self._threads:
            self._parts.console.drain()
            first = min((t.vcpu.stats.first_run_ns for t in self._threads if t.vcpu.stats.first_run_ns), default=0)
            if first:
                self.spans["first KVM_RUN"] = first / 1e9
        assert self._outcome is not None
        return ExitReport(
            outcome=self._outcome,
            console=self._console.tail,
            spans=dict(self.spans),
            statistics=collect(self._parts, [thread.vcpu for thread in self._threads]),
            console_error=self._console_error,
        )

    def _powered_off(self) -> None:
        self.end(PoweredOff())

    def _debug_exit(self, code: int) -> None:
        self.end(Exited(code=code))

    def _reset(self) -> None:
        self.end(self._panic_or(Reset()))

    def _shut_down(self, vcpu_id: int) -> None:
        self.end(self._panic_or(TripleFault(vcpu_id=vcpu_id)))

    def _panic_or(self, outcome: Outcome) -> Outcome:
        from kvmlite.machine.kernel_loading import panicked
        from kvmlite.machine.outcome import Panicked

        return Panicked() if panicked(self._parts.memory) else outcome

    def _device_failed(self, error: BaseException) -> None:
        self.end(VmmError(error=error))

    def _console_broken(self, error: OSError) -> None:
        self._console_error = error
        self.stop(f"nobody takes the console's output any more ({error.strerror})")
