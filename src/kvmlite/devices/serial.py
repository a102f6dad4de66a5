"""8250 serial ports, seen from the host: where output goes, where input comes from.

The register file is C (``_native/src/serial.c``): a console is one exit per byte. Output collects in a queue of 64 KiB
that the device loop empties as fast as the reader takes it, without ever waiting; when the queue is full the vCPU waits
for the reader, so nothing is lost and a slow reader slows only the guest.
"""

from __future__ import annotations

import os

from kvmlite._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmlite.bus import Bus
    from kvmlite.host.eventfd import EventFd
    from kvmlite.host.loop import DeviceLoop

    class Reader(Protocol):
        """Whoever reads a sink's output at the other end of a descriptor."""

        @property
        def fd(self) -> int:
            """What to wait for; -1 if there is nobody to wait for (any more)."""

        def is_writable(self) -> bool:
            """Whether the sink takes 4096 bytes now without waiting."""


PORT_COUNT = 8
_CHUNK = 4096


class SerialPort:
    """One 16550A.

    Args:
        sink: Takes output, in order and never two at once, on the device loop or a vCPU thread. On the latter it may
            block: the guest then waits.
        reader: Tells the loop when the sink would have to wait; None if it never does.
        irq: Raises the port's interrupt. The caller's.
        notify: Output waits or input has room. The caller's.

    Thread: ``read``/``write`` on vCPU threads, ``put_input`` on the device loop.
    """

    def __init__(
        self,
        name: str,
        sink: Callable[[bytes], None],
        *,
        irq: EventFd,
        notify: EventFd,
        reader: Reader | None = None,
    ) -> None:
        import _thread

        self.name = name
        self._sink = sink
        self._reader = reader
        self._awaited_fd = -1
        self._notify = notify
        self._native = ffi.new("struct kvl_serial *")
        lib.kvl_serial_init(self._native, irq.fd, notify.fd)
        self._drain_lock = _thread.allocate_lock()
        self._chunk = ffi.new("uint8_t[]", _CHUNK)
        self._pending_input = bytearray()
        self._input_fd = -1
        self._loop: DeviceLoop | None = None

    def attach(self, bus: Bus, loop: DeviceLoop, base: int) -> None:
        """Claim the eight ports from ``base`` and let the loop carry the output."""
        bus.claim_ports(base, PORT_COUNT, self, self.name, serial=self._native)
        self._loop = loop
        loop.add_reader(self._notify.fd, self._notified)

    def close(self) -> None:
        """After the vCPUs and the loop have stopped: hand out what is left."""
        self.drain()
        lib.kvl_serial_deinit(self._native)

    @property
    def output_total(self) -> int:
        """Bytes the guest has written."""
        return int(self._native.out_total)

    def read(self, offset: int, size: int) -> int:
        """A register, for exits that C passes up. Thread: vCPU."""
        return int(lib.kvl_serial_read(self._native, offset))

    def write(self, offset: int, size: int, value: int) -> None:
        """A register, for exits that C passes up: there was no room for output. Thread: vCPU; may block in the sink."""
        if lib.kvl_serial_room(self._native) == 0:
            self.drain()
        lib.kvl_serial_write(self._native, offset, value & 0xFF)

    def drain(self) -> None:
        """Hand waiting output to the sink, and wait for its reader if need be. Thread: not the device loop."""
        with self._drain_lock:
            while self._hand_over():
                pass
        if lib.kvl_serial_room(self._native) < lib.KVL_SERIAL_OUT_SIZE:
            self._notify.signal()  # another vCPU's output, whose notification the loop left to us

    def _hand_over(self) -> bool:
        """Give the sink one piece; whether there was any."""
        count = lib.kvl_serial_take_output(self._native, self._chunk, _CHUNK)
        if count:
            self._sink(bytes(ffi.buffer(self._chunk, count)))
        return bool(count)

    def _drain_without_waiting(self) -> None:
        """Hand over what the reader takes now; come back when it takes more. Thread: the device loop."""
        if not self._drain_lock.acquire(blocking=False):
            return  # a vCPU is at it and goes on until the queue is empty
        try:
            reader = self._reader
            while reader is None or reader.fd < 0 or reader.is_writable():
                if not self._hand_over():
                    self._await_reader(-1)
                    return
            self._await_reader(reader.fd)
        finally:
            self._drain_lock.release()

    def _await_reader(self, fd: int) -> None:
        """Be called again when ``fd`` is writable; -1 for not at all."""
        if fd == self._awaited_fd or self._loop is None:
            return
        if self._awaited_fd >= 0:
            self._loop.remove_writer(self._awaited_fd)
        self._awaited_fd = fd
        if fd >= 0:
            self._loop.add_writer(fd, self._drain_without_waiting)

    def feed_from(self, fd: int) -> None:
        """Let the loop type what it reads from ``fd`` (non-blocking not required; the fd stays the caller's)."""
        assert self._loop is not None
        self._input_fd = fd
        self._loop.add_reader(fd, self._input_readable)

    def stop_input(self) -> None:
        """Stop reading the input descriptor."""
        if self._input_fd >= 0 and self._loop is not None:
            self._loop.remove_reader(self._input_fd)
            self._input_fd = -1

    def put_input(self, data: bytes) -> None:
        """Type into the guest; what does not fit is kept and follows. Thread: device loop."""
        self._pending_input += data
        self._push_input()

    @property
    def pending_input(self) -> int:
        """Bytes typed but not yet taken by the guest's port."""
        return len(self._pending_input)

    def _push_input(self) -> None:
        if self._pending_input:
            count = lib.kvl_serial_put_input(self._native, bytes(self._pending_input), len(self._pending_input))
            del self._pending_input[:count]

    def _notified(self) -> None:
        self._notify.drain()
        self._drain_without_waiting()
        self._push_input()
        if not self._pending_input and self._input_fd >= 0 and self._loop is not None:
            self._loop.add_reader(self._input_fd, self._input_readable)

    def _input_readable(self) -> None:
        assert self._loop is not None
        data = os.read(self._input_fd, 4096)
        if not data:  # end of input: the port stays, silent
            self._loop.remove_reader(self._input_fd)
            self._input_fd = -1
            return
        self.put_input(data)
        if self._pending_input:  # read on when the guest has taken this
            self._loop.remove_reader(self._input_fd)
