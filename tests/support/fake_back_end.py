"""A vhost-user back end in a thread: serves rings as a good one does, or misbehaves at a chosen message."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable

from kvmlite.abi import vhost_user as abi
from kvmlite.abi.vhost_user import ProtocolFeature, Request

PATIENCE_S = 30.0

FEATURES = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28
PROTOCOL = 1 << ProtocolFeature.MQ | 1 << ProtocolFeature.REPLY_ACK | 1 << ProtocolFeature.CONFIG
CONFIG = bytes(range(16))

Misbehaviour = Callable[["FakeBackEnd", int, bytes], bool]
"""Called with (back end, request, payload); True if it has dealt with the message in its own way."""


class FakeBackEnd:
    """Its thread, the sockets and everything it was given; ``end`` gives all back.

    Args:
        features, protocol: What it offers.
        misbehave: Looks at each message first.
        serve: Whether it looks at the rings at all; if not, requests stay under way.

    Attributes:
        client: The front end's socket.
        seen: The requests so far.
        inflight: The area it made or was given, if any.
    """

    name = "fake-daemon"

    def __init__(
        self,
        *,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        queues: int = 2,
        misbehave: Misbehaviour | None = None,
        serve: bool = True,
    ) -> None:
        self.features = features
        self.protocol = protocol
        self.queue_count = queues
        self.misbehave = misbehave
        self.serves = serve
        self.seen: list[Request] = []
        self.bases: dict[int, int] = {}
        self.inflight_fd = -1
        self.was_given_inflight = False
        self.driver_features = 0
        self._queues: dict[int, dict[str, int]] = {}
        self._memory: list[tuple[int, int, mmap.mmap]] = []
        self.client, self._socket = socket.socketpair()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._status = ""
        self._watching: tuple[object, ...] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # ---- as Daemon ----

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def watch(self, loop: object, on_end: Callable[[], None]) -> None:
        def ended() -> None:
            loop.remove_reader(self._ended)  # type: ignore[attr-defined]
            on_end()

        self._watching = (loop,)
        loop.add_reader(self._ended, ended)  # type: ignore[attr-defined]

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def end_text(self) -> str:
        return self._status or "was killed (SIGTERM)"

    def end(self, timeout_s: float = 3.0) -> None:
        if self._ended < 0:
            return
        if self._watching is not None:
            self._watching[0].remove_reader(self._ended)  # type: ignore[attr-defined]
        os.eventfd_write(self._wake, 1)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        os.close(self._wake)
        os.close(self._ended)
        self._ended = -1

    # ---- what a test does to it ----

    def die(self, status: str = "was killed (SIGKILL)") -> None:
        """End as a process does that is killed: connection, memory and all."""
        self._status = status
        os.eventfd_write(self._wake, 1)
        self._thread.join(PATIENCE_S)

    def hang_up(self) -> None:
        """Close the connection and live on."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def reply(self, request: int, payload: bytes, *, flags: int = abi.VERSION | abi.FLAG_REPLY, size: int = -1) -> None:
        """Send a reply, whatever it says."""
        self._socket.sendall(abi.HEADER.pack(request, flags, len(payload) if size < 0 else size) + payload)

    # ---- its thread ----

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except OSError:
            pass
        finally:
            self._socket.close()
            for queue in self._queues.values():
                for name in ("kick", "call"):
                    if name in queue:
                        os.close(queue[name])
            for _, _, view in self._memory:
                view.close()
            if self.inflight_fd >= 0:
                os.close(self.inflight_fd)
            os.eventfd_write(self._ended, 1)

    def _step(self) -> bool:
        kicks = {queue["kick"]: index for index, queue in self._queues.items() if "kick" in queue and self.serves}
        ready, _, _ = select.select([self._socket, self._wake, *kicks], [], [])
        if self._wake in ready:
            return False
        for fd in ready:
            if fd in kicks:
                os.eventfd_read(fd)
                self._serve(kicks[fd])
        return self._socket not in ready or self._take_message()

    def _take_message(self) -> bool:
        header, fds, _, _ = socket.recv_fds(self._socket, abi.HEADER.size, 8)
        if not header:
            self._wait_for_end()
            return False
        request, flags, size = abi.HEADER.unpack(header)
        payload = self._socket.recv(size, socket.MSG_WAITALL) if size else b""
        self.seen.append(Request(request))
        if self._misbehaves(request, payload, fds):
            return True
        answer = self._handle(Request(request), payload, fds)
        if answer is None and flags & abi.FLAG_NEED_REPLY:
            answer = abi.U64.pack(0)
        if answer is not None:
            self.reply(request, answer)
        return True

    def _misbehaves(self, request: int, payload: bytes, fds: list[int]) -> bool:
        is_done = True
        try:
            is_done = self.misbehave is not None and self.misbehave(self, request, payload)
        finally:
            for fd in fds if is_done else ():
                os.close(fd)
        return is_done

    def _wait_for_end(self) -> None:
        select.select([self._wake], [], [], PATIENCE_S)

    def _handle(self, request: Request, payload: bytes, fds: list[int]) -> bytes | None:
        if request == Request.GET_FEATURES:
            return abi.U64.pack(self.features)
        if request == Request.GET_PROTOCOL_FEATURES:
            return abi.U64.pack(self.protocol)
        if request == Request.GET_QUEUE_NUM:
            return abi.U64.pack(self.queue_count)
        if request == Request.GET_CONFIG:
            return payload[: abi.CONFIG_HEADER.size] + CONFIG
        if request == Request.SET_FEATURES:
            self.driver_features = abi.U64.unpack(payload)[0]
        elif request == Request.SET_MEM_TABLE:
            count, _ = abi.MEMORY_HEADER.unpack_from(payload)
            for index in range(count):
                gpa, size, _, offset = abi.MEMORY_REGION.unpack_from(payload, 8 + 32 * index)
                self._memory.append((gpa, size, mmap.mmap(fds[index], size, offset=offset)))
                os.close(fds[index])
        elif request == Request.GET_INFLIGHT_FD:
            return self._make_inflight(payload)
        elif request == Request.SET_INFLIGHT_FD:
            if self.inflight_fd >= 0:
                os.close(self.inflight_fd)
            self.inflight_fd, self.was_given_inflight = fds[0], True
        elif request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL):
            name = "kick" if request == Request.SET_VRING_KICK else "call"
            self._queues[abi.U64.unpack(payload)[0] & 0xFF][name] = fds[0]
        elif request == Request.SET_VRING_ADDR:
            index, _, desc, used, avail, _ = abi.VRING_ADDR.unpack(payload)
            self._queues[index].update(desc=desc, used=used, avail=avail)
        elif request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE):
            index, number = abi.VRING_STATE.unpack(payload)
            self._queues.setdefault(index, {})["size" if request == Request.SET_VRING_NUM else "last"] = number
            if request == Request.SET_VRING_BASE:
                self.bases[index] = number
        elif request == Request.GET_VRING_BASE:
            index = abi.VRING_STATE.unpack(payload)[0]
            queue = self._queues.pop(index)
            os.close(queue["kick"])
            os.close(queue["call"])
            return abi.VRING_STATE.pack(index, queue["last"])
        return None

    def _make_inflight(self, payload: bytes) -> None:
        _, _, queues, size = abi.INFLIGHT.unpack(payload)
        self.inflight_fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        os.ftruncate(self.inflight_fd, 4096)
        answer = abi.INFLIGHT.pack(4096, 0, queues, size)
        header = abi.HEADER.pack(Request.GET_INFLIGHT_FD, abi.VERSION | abi.FLAG_REPLY, len(answer))
        socket.send_fds(self._socket, [header + answer], [self.inflight_fd])

    def _at(self, gpa: int) -> tuple[mmap.mmap, int]:
        for start, size, view in self._memory:
            if start <= gpa < start + size:
                return view, gpa - start
        raise AssertionError(f"{gpa:#x} is in no region")

    def _load(self, gpa: int, layout: str) -> tuple[int, ...]:
        view, offset = self._at(gpa)
        return struct.unpack_from(layout, view, offset)

    def _store(self, gpa: int, layout: str, *values: int) -> None:
        view, offset = self._at(gpa)
        struct.pack_into(layout, view, offset, *values)

    def _serve(self, index: int) -> None:
        """Fill the writable buffers of each chain with the letter x."""
        queue = self._queues[index]
        size = queue["size"]
        while queue["last"] != self._load(queue["avail"] + 2, "<H")[0]:
            (head,) = self._load(queue["avail"] + 4 + 2 * (queue["last"] % size), "<H")
            queue["last"] = queue["last"] + 1 & 0xFFFF
            written, following, flags = 0, head, 1
            while flags & 1:
                gpa, length, flags, next_index = self._load(queue["desc"] + 16 * following, "<QIHH")
                if flags & 2:
                    view, offset = self._at(gpa)
                    view[offset : offset + length] = b"x" * length
                    written += length
                following = next_index
            (used,) = self._load(queue["used"] + 2, "<H")
            self._store(queue["used"] + 4 + 8 * (used % size), "<II", head, written)
            self._store(queue["used"] + 2, "<H", used + 1 & 0xFFFF)
        os.eventfd_write(queue["call"], 1)
