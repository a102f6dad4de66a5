"""Build of ``kvmlite._native._kvl``, the C data plane (cffi API mode).

``cdef/*.h`` declares what Python may call, ``src/*.c`` defines it. Layouts of kernel structures are completed by the
compiler from the installed UAPI headers (``...;``), so a wrong field is a build error.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent.parent

STRICT = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wvla", "-Werror"]
HARDENED = ["-O2", "-g0", "-fno-strict-aliasing", "-fstack-protector-strong", "-fvisibility=hidden"]

# cffi's own glue follows this; our strictness is for our sources.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include <linux/kvm.h>
"""


def source_name(path: Path) -> str:
    """Path of a source file relative to setup.py, as setuptools wants it."""
    return str(path.relative_to(PROJECT))


def headers() -> list[Path]:
    """Private headers of the data plane; each declares one source file."""
    return sorted((HERE / "src").glob("*.h"))


ffibuilder = FFI()
for cdef in sorted((HERE / "cdef").glob("*.h")):
    ffibuilder.cdef(cdef.read_text())
ffibuilder.set_source(
    "kvmlite._native._kvl",
    PREAMBLE + "".join(f'#include "{header.name}"\n' for header in headers()),
    sources=[source_name(source) for source in sorted((HERE / "src").glob("*.c"))],
    depends=[str(header) for header in headers()],
    include_dirs=[str(HERE / "src")],
    extra_compile_args=[*STRICT, *HARDENED, "-isystem", sysconfig.get_paths()["include"]],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    raise SystemExit("build with: python setup.py build_ext --inplace")
