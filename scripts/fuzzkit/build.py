"""Build the data plane once more, with libFuzzer, its instrumentation and the sanitizers, and load it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from contextlib import redirect_stdout
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from shutil import which

PROJECT = Path(__file__).resolve().parent.parent.parent
TESTS = PROJECT / "tests/native"
MODULE = "kvmlite._native._kvl"
CLANGS = ("clang", *(f"clang-{version}" for version in range(22, 13, -1)))
SANITIZERS = ("-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=all", "-shared-libasan")
WRAPPED = ("kvl_virtq_init", "kvl_virtq_pop", "kvl_virtq_push", "kvl_mem_discard")
BUILD_TIMEOUT_S = 300.0


def find_clang() -> str | None:
    """Path of a clang that comes with libFuzzer and the shared AddressSanitizer; None if there is none."""
    for name in CLANGS:
        path = which(name)
        if path is not None and all(os.path.isabs(runtime) for runtime in _runtimes(path)):
            return path
    return None


def _runtimes(clang: str) -> tuple[str, str]:
    """libFuzzer without a main, and AddressSanitizer; bare names if it has them not."""
    names = ("libclang_rt.fuzzer_no_main-x86_64.a", "libclang_rt.asan-x86_64.so")
    found = []
    for name in names:
        command = [clang, f"--print-file-name={name}"]
        found.append(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip())
    return found[0], found[1]


def sanitizer(clang: str) -> str:
    """The library to preload, because the interpreter is not built with it."""
    return _runtimes(clang)[1]


def build(clang: str, target: Path) -> None:
    """Compile the data plane with ``device_fuzzer.c`` into ``target``, unless it is newer than all its sources."""
    from cffi import FFI

    from kvmlite._native.build import HERE, PREAMBLE, headers

    c_sources = [*sorted((HERE / "src").glob("*.c")), TESTS / "device_fuzzer.c"]
    declared = [*sorted((HERE / "cdef").glob("*.h")), *headers(), TESTS / "device_fuzzer.h"]
    newest = max(path.stat().st_mtime for path in (*c_sources, *declared, Path(__file__)))
    if target.exists() and target.stat().st_mtime >= newest:
        return
    ffi = FFI()
    for cdef in sorted((HERE / "cdef").glob("*.h")):
        ffi.cdef(cdef.read_text())
    ffi.cdef(_fuzzer_declarations() + 'extern "Python+C" int fuzz_case(void);')
    includes = "".join(f'#include "{header.name}"\n' for header in headers())
    ffi.set_source(MODULE, PREAMBLE + includes + '#include "device_fuzzer.h"\n')
    target.parent.mkdir(parents=True, exist_ok=True)
    glue = target.with_suffix(f".{os.getpid()}.c")
    with redirect_stdout(sys.stderr):
        ffi.emit_c_code(str(glue))
    scratch = target.with_suffix(f".{os.getpid()}")
    command = [clang, "-std=gnu11", "-g", "-O1", "-w", "-fPIC", "-shared", *SANITIZERS, "-DPy_LIMITED_API=0x030b0000"]
    command += [f"-I{HERE / 'src'}", f"-I{TESTS}", "-isystem", sysconfig.get_paths()["include"]]
    command += [str(glue), *map(str, c_sources), *(f"-Wl,--wrap={name}" for name in WRAPPED)]
    command += ["-Wl,--whole-archive", _runtimes(clang)[0], "-Wl,--no-whole-archive", "-lstdc++", "-lm", "-pthread"]
    command += ["-Wl,-Bsymbolic", "-o", str(scratch)]  # libFuzzer's own hooks, not the idle ones of the sanitizer
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S)
    glue.unlink()
    scratch.replace(target)


def _fuzzer_declarations() -> str:
    text = (TESTS / "device_fuzzer.h").read_text()
    return text.partition("/* cffi reads from here to the end mark. */")[2].partition("/* end of what cffi reads */")[0]


def load(library: Path) -> None:
    """Make it the module that ``kvmlite._native`` will import. Before anything else of kvmlite is."""
    loader = ExtensionFileLoader(MODULE, str(library))
    spec = importlib.util.spec_from_file_location(MODULE, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[MODULE] = module
