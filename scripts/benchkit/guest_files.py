"""What both monitors are given to boot: made once, in a folder of the benchmark's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def unpacked(kernel: Path, folder: Path) -> Path:
    """Return the vmlinux in a bzImage, put into the folder: QEMU boots it faster. A vmlinux is returned as it is."""
    from kvmlite.boot import open_kernel
    from kvmlite.boot.unpack import unpack
    from kvmlite.paths import vmlinux_cache

    path = folder / "vmlinux"
    with open_kernel(kernel) as image:
        if image.bzimage is None:
            return kernel
        with unpack(image, vmlinux_cache()) as source, open(path, "wb") as file:
            os.sendfile(file.fileno(), source.fd, 0, os.fstat(source.fd).st_size)
    return path


class StockGuest:
    """A stock kernel and an initramfs with its modules, busybox, and a script to be its init: ``rdinit=/bench``.

    Args:
        folder: Where the files go.
        kernel: As for ``kvmlite run --kernel``.
        features: Those of the kernel that the initramfs has modules for.
        script: What ``/bench`` is.
        extra: More files of the initramfs: path in it, path here.
    """

    def __init__(
        self, folder: Path, kernel: Path, features: tuple[str, ...], script: str, extra: Mapping[str, str] = {}
    ) -> None:
        from kvmlite.images.initramfs import build_base
        from kvmlite.images.kernels import resolve

        init = folder / "init"
        init.write_text(script)
        init.chmod(0o755)
        found = resolve(str(kernel))
        self.kernel = Path(found.path)
        self.vmlinux = unpacked(self.kernel, folder)
        self.initrd = folder / "initrd.cpio"
        base = build_base(found, features, agent="/bin/busybox", extra={"/bench": str(init), **extra})
        shutil.copyfile(base.path, self.initrd)
        base.close()
