"""Guest agent: its program, the protocol it speaks, and the host's side of it."""

from __future__ import annotations

import os

from kvmlite.errors import HostError


def agent_path() -> str:
    """Path of the agent program, which becomes ``/init`` of a guest's initramfs.

    Raises:
        HostError: It has not been built.
    """
    path = os.path.join(os.path.dirname(__file__), "agent", "kvmlite-agent")
    if not os.path.exists(path):
        raise HostError(
            f"guest agent {path}: not built", hint="run: python -m kvmlite.guest.build_agent (needs gcc and libc6-dev)"
        )
    return path
