"""A block device that loses power or has bad sectors: a file behind a loop device behind the device mapper."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SECTOR = 512


class FaultDisk:
    """A disk of ``size`` bytes whose data is in ``directory``. A context manager; leaving it removes the devices."""

    def __init__(self, directory: Path, size: int) -> None:
        self._name = f"kvmlite-{os.getpid()}-{directory.name}"
        self._sectors = size // SECTOR
        file = directory / "disk"
        with file.open("wb") as created:
            created.truncate(size)
        self._loop = _run("losetup", "--find", "--show", str(file))
        try:
            _run("dmsetup", "create", self._name, "--table", self._whole())
        except BaseException:
            _run("losetup", "--detach", self._loop)
            raise
        _run("dmsetup", "mknodes", self._name)
        self.path = f"/dev/mapper/{self._name}"

    def __enter__(self) -> FaultDisk:
        return self

    def __exit__(self, *_: object) -> None:
        _run("dmsetup", "remove", "--retry", self._name)
        _run("losetup", "--detach", self._loop)

    def fail(self) -> None:
        """From now on every access is an I/O error: what was not made durable before is lost."""
        self._load(f"0 {self._sectors} error")

    def fail_between(self, first: int, end: int) -> None:
        """The sectors from ``first`` up to ``end`` cannot be read or written."""
        rows = [
            f"0 {first} linear {self._loop} 0",
            f"{first} {end - first} error",
            f"{end} {self._sectors - end} linear {self._loop} {end}",
        ]
        self._load("\n".join(rows))

    def mend(self) -> None:
        """All of it works again, with what it had last."""
        self._load(self._whole())

    def _whole(self) -> str:
        return f"0 {self._sectors} linear {self._loop} 0"

    def _load(self, table: str) -> None:
        _run("dmsetup", "suspend", "--noflush", "--nolockfs", self._name)  # what is in caches stays there
        _run("dmsetup", "reload", self._name, "--table", table)
        _run("dmsetup", "resume", self._name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
