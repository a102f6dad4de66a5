"""One port: a queue in each direction on the guest's side, a stream socket on the host's.

Nothing is buffered here. Guest output stays in its chain while the host does not read, and host input stays in its
socket while the guest has no buffers or has not opened the port (Linux would throw it away, VIRTIO 1.2, 5.3.6.3).
"""

from __future__ import annotations

import _thread
import select
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmlite.virtio.device import Interrupt
    from kvmlite.virtio.queue import DescriptorChain, Virtqueue

    class PortLoop(Protocol):
        """What is needed of the device loop."""

        def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
            """Call back while ``fd`` is readable."""

        def remove_reader(self, fd: int) -> None:
            """Forget it."""

        def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
            """Call back while ``fd`` is writable."""

        def remove_writer(self, fd: int) -> None:
            """Forget it."""

        def post(self, function: Callable[[], object]) -> None:
            """Run on the loop's thread."""


_CHUNK = 65536  # bytes moved at a time
_TURN_CHUNKS = 16  # and so many times before others have their turn


class ConsolePort:
    """A port and whoever is connected to it.

    Args:
        number: 0 is the console, others are named.
        name: What the guest calls it; "" for the console.
        loop: The device loop.
        on_host_change: Called on the loop after the host's end came or went.

    Thread: ``connect`` and ``set_sink`` any; the rest the device loop.
    """

    def __init__(self, number: int, name: str, loop: PortLoop, on_host_change: Callable[[ConsolePort], None]) -> None:
        self.number = number
        self.name = name
        self.is_guest_open = False
        self._loop = loop
        self._on_host_change = on_host_change
        self._sink: Callable[[bytes], None] | None = None
        self._lock = _thread.allocate_lock()
        self._next: socket.socket | None = None  # connected, on its way to the loop; under the lock
        self._socket: socket.socket | None = None
        self._is_reading = False
        self._is_waiting_to_write = False
        self._has_host_ended = False
        self._is_ending = False  # the guest has closed: the host's end goes once it has taken the output
        self._rx: Virtqueue | None = None
        self._tx: Virtqueue | None = None
        self._interrupt: Interrupt | None = None
        self._spare: DescriptorChain | None = None  # rx chain the host had no bytes for
        self._output: DescriptorChain | None = None  # tx chain the host has not taken all of
        self._output_offset = 0

    # ---- the host's face ----

    @property
    def is_connected(self) -> bool:
        """Whether somebody on the host holds the other end."""
        return self._socket is not None

    def connect(self) -> int:
        """Return a blocking stream socket's fd, owned by the caller: reads guest output, writes guest input.

        Closing it tells the guest that nobody listens. Who was connected before reads end of stream. What the guest
        sends while nobody is connected is dropped.

        Raises:
            StateError: The machine has ended.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with self._lock:
            superseded, self._next = self._next, ours
        if superseded is not None:
            superseded.close()
        try:
            self._loop.post(self._take_connection)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return theirs.detach()

    def set_sink(self, sink: Callable[[bytes], None] | None) -> None:
        """Give all guest output to a function, too: at most 64 KiB at a time, on the device loop."""
        self._sink = sink

    # ---- the device's face ----

    def start(self, rx: Virtqueue, tx: Virtqueue, interrupt: Interrupt) -> None:
        """Take the queues of a driver that is up."""
        self._rx, self._tx, self._interrupt = rx, tx, interrupt

    def stop(self) -> None:
        """Touch the queues no more; the host's end reads end of stream."""
        self._rx = self._tx = self._interrupt = self._spare = self._output = None
        self.is_guest_open = False
        self._drop_socket()

    def close(self) -> None:
        """Close what is the host's; the loop has stopped."""
        with self._lock:
            waiting, self._next = self._next, None
        for end in (waiting, self._socket):
            if end is not None:
                end.close()
        self._socket = None

    def set_guest_open(self, is_open: bool) -> None:
        """The guest opened or closed its end; after a close the host reads what was sent, then end of stream."""
        was_open, self.is_guest_open = self.is_guest_open, is_open
        if is_open:
            self.resume_input()
        elif was_open:
            self._pause_input()
            self._is_ending = True
            self.pump_output()

    def _take_connection(self) -> None:
        with self._lock:
            ours, self._next = self._next, None
        if ours is None:
            return
        self._disconnect()
        self._socket = ours
        self._has_host_ended = self._is_ending = False
        self._on_host_change(self)
        self.resume_input()

    def _disconnect(self) -> None:
        """Drop the host's end and what it has not read."""
        if self._socket is None:
            return
        self._drop_socket()
        self._on_host_change(self)
        if self._output is not None and self._tx is not None:
            self._tx.add_used(self._output.head_index, 0)
            self._output = None
            self._notify(self._tx)
            self._loop.post(self.pump_output)

    def _drop_socket(self) -> None:
        if self._socket is None:
            return
        self._pause_input()
        self._stop_waiting_to_write()
        self._socket.close()
        self._socket = None
        self._is_ending = False

    def _notify(self, queue: Virtqueue) -> None:
        if self._interrupt is not None and queue.needs_interrupt():
            self._interrupt.raise_queue()

    # ---- guest to host ----

    def pump_output(self) -> None:
        """Move guest output to the host until there is none, the host is full, or others should have their turn."""
        tx = self._tx
        if tx is None:
            return
        for _ in range(_TURN_CHUNKS):
            if self._output is None:
                self._output, self._output_offset = tx.pop(), 0
                if self._output is None:
                    self._end_if_due(tx)
                    break
            if self._output.readable_size > self._output_offset:
                taken = self._deliver(self._output)
                if taken == 0:
                    break
                self._output_offset += taken
            if self._output is not None and self._output_offset >= self._output.readable_size:
                tx.add_used(self._output.head_index, 0)
                self._output = None
        else:
            self._loop.post(self.pump_output)
        self._notify(tx)

    def _end_if_due(self, tx: Virtqueue) -> None:
        if self._is_ending and not tx.has_more:
            self._is_ending = False
            self._disconnect()

    def _deliver(self, chain: DescriptorChain) -> int:
        """Hand over the next bytes; returns how many, 0 to wait for the host."""
        offset = self._output_offset
        if self._sink is None and self._socket is None:
            return chain.readable_size - offset  # nobody is there; a chain may claim 4 GiB
        size = min(chain.readable_size - offset, _CHUNK)
        if self._sink is None:
            return self._send(chain.readable_views(offset, size), size)
        data = chain.read(offset, size)
        if self._socket is not None:
            data = data[: self._send([memoryview(data)], size)]
        if data:
            self._sink(data)
        return len(data)

    def _send(self, views: list[memoryview], size: int) -> int:
        assert self._socket is not None
        try:
            return self._socket.sendmsg(views, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            if not self._is_waiting_to_write:
                self._is_waiting_to_write = True
                self._loop.add_writer(self._socket.fileno(), self._host_writable)
            return 0
        except (BrokenPipeError, ConnectionResetError):
            self._drop_socket()
            self._on_host_change(self)
            return size  # nobody there to take it

    def _host_writable(self) -> None:
        self._stop_waiting_to_write()
        self.pump_output()

    def _stop_waiting_to_write(self) -> None:
        if self._is_waiting_to_write and self._socket is not None:
            self._is_waiting_to_write = False
            self._loop.remove_writer(self._socket.fileno())

    # ---- host to guest ----

    def resume_input(self) -> None:
        """Watch the host's end, if there is a guest to read for."""
        if self._socket is None or self._rx is None or not self.is_guest_open:
            return
        if not self._is_reading and not self._has_host_ended:
            self._is_reading = True
            self._loop.add_reader(self._socket.fileno(), self._host_readable)

    def _pause_input(self) -> None:
        if self._is_reading and self._socket is not None:
            self._is_reading = False
            self._loop.remove_reader(self._socket.fileno())

    def _host_readable(self) -> None:
        rx = self._rx
        if rx is None:
            return
        for _ in range(_TURN_CHUNKS):
            chain = self._spare or rx.pop()
            self._spare = None
            if chain is None:
                self._pause_input()  # the driver's next buffer resumes it
                break
            if not self._fill(rx, chain):
                break
        self._notify(rx)

    def _fill(self, rx: Virtqueue, chain: DescriptorChain) -> bool:
        """Put host bytes into a chain; returns whether there may be more."""
        if chain.writable_size == 0:
            rx.add_used(chain.head_index, 0)
            return True
        assert self._socket is not None
        try:
            size = self._socket.recvmsg_into(chain.writable_views(0, _CHUNK))[0]
        except BlockingIOError:
            self._spare = chain
            return False
        except ConnectionResetError:
            size = 0
        if size == 0:
            self._spare = chain
            self._host_ended()
            return False
        rx.add_used(chain.head_index, size)
        return True

    def _host_ended(self) -> None:
        """End of stream: either the host has gone, or it only shut down its writing."""
        assert self._socket is not None
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)
        if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)):
            self._disconnect()
        else:
            self._has_host_ended = True
            self._pause_input()
