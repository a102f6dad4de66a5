"""A socket for a back end that wants to accept a connection, with the connection already in its queue."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile


def connected_listener() -> tuple[socket.socket, socket.socket]:
    """Return (listening socket for the back end to inherit, our end of the connection that it will accept).

    The name of the socket is gone when this returns: nobody else can connect, and nothing is left on the disk. A back end
    whose front end dies before it came to accept finds the connection closed.

    Raises:
        OSError: No room for sockets, or no place for temporary files.
    """
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        client = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        directory = tempfile.mkdtemp(prefix="kvmlite-")
        try:
            parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                address = f"/proc/self/fd/{parent}/back-end"  # however long the directory's own name is
                listener.bind(address)
                listener.listen(1)
                client.connect(address)
            finally:
                os.close(parent)
        finally:  # takes no descriptor, as there may be none left
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{directory}/back-end")
            os.rmdir(directory)
        sockets.pop_all()
    return listener, client
