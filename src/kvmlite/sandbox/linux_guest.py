"""A stock Linux kernel with our agent in it: boots, runs commands, and ends with a typed outcome.

with LinuxGuest(GuestConfig()) as guest:
    guest.start()
    guest.wait_agent()
    report = guest.run_to_end(guest.exec(["uname", "-a"]))
"""

from __future__ import annotations

import os
import threading
import time

from kvmlite.abi.layout import virtio_mmio_window
from kvmlite.errors import BootError, ConfigError, KvmliteError, StateError
from kvmlite.guest import agent_path
from kvmlite.guest.agent import AgentClient, ChannelLost
from kvmlite.images.initramfs import build_base, build_overlay
from kvmlite.images.kernels import resolve
from kvmlite.machine.config import Kernel, MachineConfig
from kvmlite.machine.machine import HANG_CHECK_S, Machine
from kvmlite.machine.outcome import Exited, Hung, Lost, TimedOut, describe
from kvmlite.records import dataclass
from kvmlite.sandbox.channels import CHANNELS, choose_channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kvmlite.guest.agent import Hello
    from kvmlite.guest.execution import ExecHandle
    from kvmlite.kvm.prepared import PreparedVm
    from kvmlite.machine.config import DeviceSpec
    from kvmlite.machine.outcome import ExitReport, Outcome
    from kvmlite.sandbox.parts import GuestPart

# panic=-1: restart at once, so that a panic ends the machine. reboot=panic_warm: and tells it from other restarts
# (machine.kernel_loading). pci=off, nr_uarts: look for nothing this machine does not have.
BASE_CMDLINE = "console=ttyS0 quiet panic=-1 reboot=panic_warm pci=off cryptomgr.notests"
LOSS_GRACE_S = 1.2
LOSS_CHECK_S = 0.3
PING_EVERY_S = 2.0
WRITE_BACK_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """A Linux guest.

    Attributes:
        kernel: Name in the store, path, or None for the default.
        memory_mib, vcpu_count, memory_backing, acpi: As in ``MachineConfig``.
        append: Added to the kernel's command line, last.
        initrd: Archives the kernel unpacks over ours.
        features: What else the guest's kernel shall be able to do: names of ``images.modules.FEATURES``.
        devices: Devices beside the one the agent speaks through.
        parts: Root disk, shared directories, networks: given to the guest in this order.
        channel: ``auto``, ``vsock``, ``console``, ``serial`` or ``vhost-vsock``.
        unpack: As in ``Kernel``.
        console_fd: Where the guest's console goes; -1 to keep only its end.
        boot_timeout_s: Until the agent answers.
        hang_timeout_s: How long a running guest may leave the agent's pings unanswered.
    """

    kernel: str | os.PathLike[str] | None = None
    memory_mib: int = 256
    vcpu_count: int = 1
    memory_backing: str = "anonymous"
    acpi: bool = True
    append: tuple[str, ...] = ()
    initrd: tuple[str | os.PathLike[str] | bytes, ...] = ()
    features: tuple[str, ...] = ()
    devices: tuple[DeviceSpec, ...] = ()
    parts: tuple[GuestPart, ...] = ()
    channel: str = "auto"
    unpack: bool = True
    console_fd: int = -1
    boot_timeout_s: float = 120.0
    hang_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.channel != "auto" and self.channel not in CHANNELS:
            raise ConfigError(f"unknown channel {self.channel!r}; choose auto, {', '.join(CHANNELS)}")


class LinuxGuest:
    """One guest. A context manager; leaving it stops the guest and gives everything back.

    Args:
        config: What it shall be.
        prepared: A VM made ahead of time; taken over. Without, a host whose KVM cannot boot Linux is refused at once.

    Raises:
        UnsupportedError: This host's KVM is a software one.
        ConfigError, ImageError, HostError: The request, a file or the host is at fault.

    Thread: any, one call of ``start``; callbacks of the agent run on the machine's device loop.
    """

    def __init__(self, config: GuestConfig, *, prepared: PreparedVm | None = None) -> None:
        self.config = config
        self._closing = threading.Event()
        if prepared is None:
            _refuse_software_kvm()
        kernel = resolve(config.kernel)
        part_features = [feature for part in config.parts for feature in part.features]
        wanted = tuple(dict.fromkeys(("mmio", "vsock", "console", *config.features, *part_features)))
        base = build_base(kernel, wanted, agent=str(agent_path()))
        try:
            self._channel = choose_channel(config.channel, base, kernel, acpi=config.acpi)
            self._build(kernel.path, base.path, prepared)
        finally:
            base.close()
        self.kernel = kernel
        self._agent: AgentClient | None = None
        self._stream_fd = -1
        self._connected = threading.Event()
        self._watch = threading.Thread(target=self._watch_agent, name="agent-watch", daemon=True)
        self._hello: Hello | None = None

    def _build(self, kernel_path: str, base: str, prepared: PreparedVm | None) -> None:
        try:
            overlay = build_overlay(self._channel.settings)
            self.machine = Machine(self._machine_config(kernel_path, base, overlay), prepared=prepared)
            self.machine.call_on_end(self._machine_ended)
            self.machine.build()  # reads the archive
        except BaseException:
            self._channel.close()
            raise

    def __enter__(self) -> LinuxGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the machine; returns at once."""
        self.machine.start()
        self._channel.open(self.machine, self._take_stream)

    @property
    def agent(self) -> AgentClient:
        """The guest's agent.

        Raises:
            StateError: ``wait_agent`` has not returned yet.
        """
        if self._agent is None:
            raise StateError("the guest's agent has not come up yet: call wait_agent first")
        return self._agent

    def wait_agent(self, timeout_s: float | None = None) -> Hello:
        """Wait for the agent; what it says of itself.

        Raises:
            BootError: It did not come within the boot timeout (or ``timeout_s``), or the guest ended before.
            GuestError: A part of the guest could not be set up inside it.
        """
        limit = self.config.boot_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        while not self._connected.wait(HANG_CHECK_S) and not self.machine.has_ended():
            self._check_boot(deadline, limit)
        while not self.machine.has_ended():
            if self._agent is None:
                self._agent = AgentClient(self._stream_fd, self.machine.loop)
            try:
                hello = self._agent.hello(HANG_CHECK_S)
            except TimeoutError:
                self._check_boot(deadline, limit)
            except ChannelLost:
                self._wait_for_reason()
                break
            else:
                if self._hello is None:
                    self._note_boot(hello)
                    self._set_up_parts()
                return hello
        raise self._boot_error("the guest ended while it came up")

    def _set_up_parts(self) -> None:
        slot = len(self._channel.devices) + len(self.config.devices)  # as in _machine_config
        for part in self.config.parts:
            end = slot + len(part.devices)
            part.set_up(self.agent, [virtio_mmio_window(number).gpa for number in range(slot, end)])
            slot = end
        if self.config.parts:
            self.machine.mark("parts set up")

    def exec(self, argv: Sequence[str], **options: Any) -> ExecHandle:
        """Start a command; see ``AgentClient.exec``."""
        return self.agent.exec(argv, **options)

    def run_to_end(self, handle: ExecHandle, deadline: float | None = None, limit_s: float = 0.0) -> ExitReport:
        """Wait for a command and end the guest with its status; or for whatever else ends the guest first.

        Args:
            deadline: On the monotonic clock; None for ever.
            limit_s: What the deadline was made of, for the report.

        Raises:
            ExecFailed: The command did not start.
        """
        outcome = self._wait_command(handle, deadline, limit_s)
        self.machine.mark("first result")
        if isinstance(outcome, Exited):
            outcome = self._write_back(outcome)
        self.machine.end(outcome)
        return self.machine.wait()

    def close(self) -> None:
        """Stop the guest and give everything back. Twice is harmless."""
        self._closing.set()
        self.machine.close()
        self._channel.close()
        if self._watch.is_alive():
            self._watch.join()
        if self._agent is not None:
            self._agent.release()
        elif self._stream_fd >= 0:
            os.close(self._stream_fd)
            self._stream_fd = -1

    def _machine_config(self, kernel_path: str, base: str, overlay: bytes) -> MachineConfig:
        config = self.config
        cmdline = " ".join((BASE_CMDLINE, *config.append))
        return MachineConfig(
            kernel=Kernel(
                path=kernel_path, cmdline=cmdline, initrd=(base, overlay, *config.initrd), protocol="linux",
                unpack=config.unpack,
            ),
            vcpu_count=config.vcpu_count,
            memory_mib=config.memory_mib,
            memory_backing=self._memory_backing(),
            acpi=config.acpi,
            devices=(
                *self._channel.devices, *config.devices, *(device for part in config.parts for device in part.devices)
            ),
            console_fd=config.console_fd,
            agent_serial=self._channel.needs_serial,
        )  # fmt: skip

    def _memory_backing(self) -> str:
        config = self.config
        if config.memory_backing == "anonymous" and any(part.needs_shared_memory for part in config.parts):
            return "memfd"
        return config.memory_backing

    def _wait_command(self, handle: ExecHandle, deadline: float | None, limit_s: float) -> Outcome:
        while True:
            left = HANG_CHECK_S if deadline is None else min(HANG_CHECK_S, deadline - time.monotonic())
            try:
                code = handle.wait(max(0.0, left))
                return Exited(code=code, signal=handle.term_signal)
            except TimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    return TimedOut(limit_s=limit_s)
                self.machine.check_hang()
            except ChannelLost as error:
                self._wait_for_reason()
                return Lost(detail=str(error))

    def _write_back(self, outcome: Exited) -> Outcome:
        """The command is over and the guest will be ended: if a disk of it lasts, let the guest write what it still holds."""
        if not any(getattr(device, "keeps_writes", False) for device in self.machine.config.devices):
            return outcome
        self._closing.set()  # while it waits for its disks, the agent answers no pings
        try:
            self.agent.sync(WRITE_BACK_S)
        except TimeoutError:
            return Hung(detail=f"the guest has not written everything to its disks within {WRITE_BACK_S:g} s")
        except ChannelLost as error:
            self._wait_for_reason()
            return Lost(detail=f"{error} before the guest had written everything to its disks")
        return outcome

    def _wait_for_reason(self) -> None:
        """The channel has ended: give a guest that panics, resets, powers off or halts the time to show it."""
        deadline = time.monotonic() + LOSS_GRACE_S
        while not self.machine.wait_ended(LOSS_CHECK_S) and time.monotonic() < deadline:
            self.machine.check_hang()

    def _check_boot(self, deadline: float, limit_s: float) -> None:
        self.machine.check_hang()
        if time.monotonic() >= deadline and not self.machine.has_ended():
            raise self._boot_error(f"the guest did not come up within {limit_s:g} s")

    def _boot_error(self, message: str) -> BootError:
        tail = self.machine.console_tail().decode(errors="replace").strip()
        last = tail.splitlines()[-1].strip() if tail else ""
        printed = f"the last line on its console: {last}" if last else "its console stayed empty"
        if not self.machine.has_ended():
            return BootError(f"{message}; {printed}", console=tail, hint="see all of it with --console")
        report = self.machine.wait()
        return GuestEndedEarly(f"{describe(report.outcome)} before it was up; {printed}", report, console=tail)

    def _take_stream(self, fd: int) -> None:
        """The agent has connected. Thread: the device loop's, or the one that starts."""
        if self._connected.is_set():  # only the first one is the agent
            os.close(fd)
            return
        self._stream_fd = fd
        self._connected.set()

    def _note_boot(self, hello: Hello) -> None:
        """The guest's own clock tells when its kernel began and when the agent was entered."""
        now = time.monotonic()
        self._hello = hello
        self.machine.spans["kernel entry"] = now - hello.now_ns / 1e9
        self.machine.spans["init"] = now - (hello.now_ns - hello.start_ns) / 1e9
        self.machine.spans["agent ready"] = now
        self._watch.start()

    def _machine_ended(self) -> None:
        self._closing.set()
        if self.machine.state in ("running", "paused"):  # else it has not been started: nobody serves the channel
            self._channel.hang_up(self.machine)

    def _watch_agent(self) -> None:
        """A guest whose agent does not answer for long is hung, whatever its vCPUs do."""
        try:
            # A guest reads the time once, while it boots; on a busy host that is long ago by now.
            self.agent.set_clock(timeout_s=self.config.hang_timeout_s)
            while not self._closing.wait(PING_EVERY_S):
                if self.machine.state == "running":
                    self.agent.ping(self.config.hang_timeout_s)
        except TimeoutError:
            if not self._closing.is_set() and self.machine.state == "running":
                limit = self.config.hang_timeout_s
                self.machine.end(Hung(detail=f"the agent has not answered for {limit:g} s"))
        except KvmliteError:
            return  # the channel has ended: whoever waits for the command knows


def _refuse_software_kvm() -> None:
    from kvmlite.kvm.probe import refuse_software_kvm
    from kvmlite.kvm.system import Kvm

    with Kvm() as kvm:
        refuse_software_kvm(kvm)


class GuestEndedEarly(BootError):
    """The guest ended before its agent was up.

    Attributes:
        report: How it ended.
    """

    def __init__(self, message: str, report: ExitReport, *, console: str) -> None:
        super().__init__(message, console=console, hint="see all with --console")
        self.report = report
