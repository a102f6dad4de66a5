"""Fill the lab's cache: ``scripts/setup`` calls this for its lab and kernel parts.

Usage: python3 -m labkit.prepare root-disk [sudo] | default-kernel | machine | kernels [PACKAGE...]
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from labkit import image, kernel, state
from labkit.paths import CACHE, DEFAULT_KERNEL, KERNELS, LabError
from labkit.session import LostLab, OutOfTime


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say what is begun, then how long it took."""
    print(f"setup: {what}", flush=True)
    begin = time.monotonic()
    yield
    print(f"setup:   done in {time.monotonic() - begin:.0f} s", flush=True)


def root_disk(through_sudo: bool) -> None:
    """Build the lab's root disk unless it is there."""
    if image.base_image().exists():
        return
    with _told("the lab's root disk: Debian with Python, QEMU and tools (one to two minutes)"):
        if through_sudo:
            # the same cache, not root's
            names = [
                f"XDG_CACHE_HOME={CACHE.parent.parent}",
                f"PYTHONPATH={os.environ['PYTHONPATH']}",
            ]
            command = [
                "sudo",
                "env",
                *names,
                sys.executable,
                "-s",
                "-m",
                "labkit.prepare",
                "root-disk",
            ]
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode != 0:
                raise LabError("building the root disk through sudo failed")
        else:
            image.build_base()


def machine() -> None:
    """Boot and save the machine that a run without options resumes."""
    spec = state.machine_spec(kernel.find(DEFAULT_KERNEL))
    root = image.base_image()
    if not state.state_path(spec, root).exists():
        with _told("the lab's machine, booted and saved"):
            state.saved_state(spec, root, os.memfd_create("console"))


def kernels(packages: list[str]) -> None:
    """Download and unpack the kernels that are not there yet."""
    for package in packages:
        if not (KERNELS / package).exists():
            with _told(f"kernel {package}"):
                kernel.fetch(package)


def main(words: list[str]) -> int:
    """Run one subcommand; return the exit status."""
    try:
        match words:
            case ["root-disk", *rest]:
                root_disk(rest == ["sudo"])
            case ["default-kernel"]:
                kernels([DEFAULT_KERNEL])
            case ["machine"]:
                machine()
            case ["kernels", *packages]:
                kernels(packages or list(kernel.TEST_KERNELS))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (LabError, LostLab, OutOfTime) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
