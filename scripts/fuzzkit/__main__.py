"""``python -m fuzzkit --build LIBRARY``, or ``python -m fuzzkit LIBRARY fuzz_DEVICE.py LIBFUZZER_ARGUMENT...``.

The first prints what to preload for the second.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fuzzkit.branches import MarkingFinder
from fuzzkit.build import MODULE, build, find_clang, load, sanitizer

if TYPE_CHECKING:
    from fuzzkit.target import DeviceTarget

MARKED = ("kvmlite.devices.", "kvmlite.virtio.", "kvmlite.memory.")


def build_library(library: Path) -> int:
    """Build; says what to preload."""
    clang = find_clang()
    if clang is None:
        print("fuzz: no clang with libFuzzer; please run: apt-get install clang libclang-rt-dev", file=sys.stderr)
        return 1
    build(clang, library)
    print(sanitizer(clang))
    return 0


def fuzz(library: Path, path: Path, arguments: list[str]) -> int:
    """Fuzz the device of a target."""
    load(library)
    native = sys.modules[MODULE]
    branches = native.ffi.buffer(native.lib.fuzz_branches(), native.lib.fuzz_branch_count())
    MarkingFinder(MARKED, memoryview(branches).cast("B")).install()
    target: DeviceTarget = runpy.run_path(str(path))["Target"]()
    from fuzzkit.fuzzer import DeviceFuzzer  # only now: what it imports is to be marked

    return DeviceFuzzer(target).run([path.stem, *arguments])


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    if arguments[:1] == ["--build"] and len(arguments) == 2:
        return build_library(Path(arguments[1]))
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    return fuzz(Path(arguments[0]).absolute(), Path(arguments[1]), arguments[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
