"""Links in network namespaces, with another namespace that plays the guest."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.namespace import LinkGuest, Namespace

from kvmlite.host.loop import DeviceLoop
from kvmlite.host.network.link import OpenLink, Surroundings

if TYPE_CHECKING:
    from kvmlite.host.network.link import Link


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notes are kept apart from those of other tests, and of the user."""
    monkeypatch.setenv("KVMLITE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A namespace that plays the host."""
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def warnings() -> list[str]:
    """What the user was told."""
    return []


@pytest.fixture
def open_link(host: Namespace, warnings: list[str]) -> Iterator[Callable[[Link], OpenLink]]:
    """Open a link on the host; it is closed at the end."""
    errors: list[BaseException] = []
    loop = host.call(DeviceLoop, errors.append)
    loop.start()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.stop)

        def run(link: Link) -> OpenLink:
            around = Surroundings(device="net0", queue_pairs=1, loop=loop, warn=warnings.append)
            opened = host.call(link.open, around)
            stack.callback(host.call, opened.close)
            return opened

        yield run
    assert errors == []


def answers(namespace: Namespace, address: str, port: int, *, timeout_s: float = 30.0) -> bytes:
    """Connect by TCP from a namespace; what the server says."""

    def run() -> bytes:
        with socket.create_connection((address, port), timeout=timeout_s) as connection:
            connection.sendall(b"?")
            return connection.recv(100)

    return namespace.call(run)


@contextlib.contextmanager
def serving(namespace: Namespace, address: str, port: int) -> Iterator[None]:
    """A TCP server in a namespace that tells each client that asks its address, as the server sees it."""
    server = namespace.call(lambda: socket.create_server((address, port)))
    is_done = False

    def serve() -> None:
        while True:
            connection, peer = server.accept()
            with connection:
                if is_done:
                    return
                connection.recv(1)
                connection.sendall(f"{address}:{port} to {peer[0]}".encode())

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        yield
    finally:
        is_done = True
        namespace.call(lambda: socket.create_connection((address, port), timeout=30).close())
        thread.join()
        server.close()


__all__ = ["LinkGuest", "answers", "serving"]
