"""Stock Debian kernels: fetch, unpack, and what the lab's own kernel needs to start.

The lab's kernel starts from ``vmlinux``, unpacked here once, and from a small initramfs with
``init.c`` and the modules to load. Neither depends on the run, so both are cached.
"""

import hashlib
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from labkit.cpio import CpioWriter
from labkit.paths import CACHE, KERNELS, LabError, locked

#: What the guests under test are: cloud and generic 6.1, 6.12, and the real-time one.
TEST_KERNELS = (
    "linux-image-cloud-amd64",
    "linux-image-6.12-cloud-amd64",
    "linux-image-amd64",
    "linux-image-rt-amd64",
)
#: Without these the lab's disks and ports do not exist.
EARLY_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console")
#: What makes it a host for virtual machines; loaded while the disks are mounted.
LATE_MODULES = ("kvm-amd", "tun", "vhost_net", "vhost_vsock", "vhost_iotlb")

_INIT_SOURCES = sorted(Path(__file__).with_name("init").glob("*.[ch]"))
_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4"),
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel on disk: ``boot/vmlinuz-VERSION`` and ``lib/modules/VERSION`` under ``root``."""

    root: Path
    image: Path
    version: str

    @property
    def modules(self) -> Path:
        """The directory with this kernel's modules and their dependency list."""
        return self.root / "lib" / "modules" / self.version


def find(name: str) -> Kernel:
    """Find a kernel by package name, by its unpacked directory, or by its ``vmlinuz``."""
    root = Path(name).resolve() if "/" in name else KERNELS / name
    if root.is_file():
        images, root = [root], root.parent.parent
    else:
        images = sorted(root.glob("boot/vmlinuz-*"))
    if not images:
        raise LabError(f"no kernel {name}: run scripts/setup kernels {name}")
    kernel = Kernel(root, images[-1], images[-1].name.removeprefix("vmlinuz-"))
    if not (kernel.modules / "modules.dep").exists():
        raise LabError(f"{kernel.image}: no modules with modules.dep in {kernel.modules}")
    return kernel


def fetch(package: str) -> None:
    """Download a kernel package with apt and unpack what is of use: image, config, modules.

    A meta package (``linux-image-amd64``) is followed to the one it depends on. Nothing is
    installed on this machine.
    """
    with locked(f"kernel-{package}"):
        if (KERNELS / package).exists():
            return
        with tempfile.TemporaryDirectory(dir=_made(KERNELS), prefix=".new-") as directory:
            # apt downloads as its own user, which must be able to write here
            scratch = Path(directory)
            real = _real_package(package)
            _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", real], cwd=scratch)
            (archive,) = scratch.glob("*.deb")
            _run(["dpkg-deb", "-x", str(archive), "all"], cwd=scratch)
            for part in ("boot", "lib/modules"):
                (scratch / "new" / part).parent.mkdir(parents=True, exist_ok=True)
                (scratch / "all" / part).rename(scratch / "new" / part)
            for symbols in scratch.glob("new/boot/System.map-*"):
                symbols.unlink()
            (modules,) = scratch.glob("new/lib/modules/*")
            _run(["depmod", "-b", str(scratch / "new"), modules.name])
            (scratch / "new").rename(KERNELS / package)


def _real_package(package: str) -> str:
    text = _run(["apt-cache", "depends", "--important", package])
    for line in text.splitlines():
        _, _, dependency = line.partition("Depends: ")
        if dependency.startswith("linux-image-"):
            return dependency.strip()
    return package


def boot_files(kernel: Kernel) -> tuple[Path, Path]:
    """Return (kernel image, initramfs) for the lab's own start, making them if need be."""
    digest = hashlib.sha256()
    stamp = kernel.image.stat()
    for part in (kernel.image, stamp.st_size, stamp.st_mtime_ns, EARLY_MODULES, LATE_MODULES):
        digest.update(f"{part}\0".encode())
    for source in _INIT_SOURCES:
        digest.update(source.read_bytes())
    home = CACHE / f"boot-{digest.hexdigest()[:16]}"
    if not home.exists():
        with locked("boot"), tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as directory:
            if not home.exists():
                scratch = Path(directory) / "boot"
                scratch.mkdir()
                _unpack_image(kernel.image, scratch / "kernel")
                _write_initramfs(kernel, scratch)
                scratch.rename(home)
    return home / "kernel", home / "initramfs"


def _unpack_image(image: Path, target: Path) -> None:
    """Unpack the ELF kernel out of a bzImage, so that the emulated CPU need not.

    Saves half a second of each start. Where it does not work out, the bzImage itself serves.
    Spec: Linux boot protocol, setup_sects, payload_offset, payload_length.
    """
    data = image.read_bytes()
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = data[start : start + length]
    for magic, program in _COMPRESSIONS:
        if payload.startswith(magic) and shutil.which(program):
            # the payload ends in its unpacked size, which the programs warn of as garbage
            done = subprocess.run([program, "-dcf"], check=False, input=payload, capture_output=True)
            if done.stdout.startswith(b"\x7fELF"):
                target.write_bytes(done.stdout)
                return
    target.write_bytes(data)


def _write_initramfs(kernel: Kernel, home: Path) -> None:
    program = home / "init"
    sources = [str(source) for source in _INIT_SOURCES if source.suffix == ".c"]
    _run(["gcc", "-std=gnu11", "-static", "-Os", "-Wall", "-Wextra", "-o", str(program), *sources])
    early = _load_order(kernel, EARLY_MODULES)
    late = [name for name in _load_order(kernel, LATE_MODULES) if name not in early]
    with open(home / "initramfs", "wb") as file:
        archive = CpioWriter(file)
        for name in ("dev", "proc", "sys", "new", "modules"):
            archive.add(name, 0o040755)
        archive.add("dev/console", 0o020600, rdev=0x501)
        archive.add("init", 0o100755, program.read_bytes())
        for path in early + late:
            archive.add(f"modules/{path.name}", 0o100644, path.read_bytes())
        for name, paths in (("early", early), ("late", late)):
            lines = "".join(f"/modules/{path.name}\n" for path in paths)
            archive.add(f"modules.{name}", 0o100644, lines.encode())
        archive.close()
    program.unlink()


def _load_order(kernel: Kernel, names: tuple[str, ...]) -> list[Path]:
    """Modules with all they depend on, each after those it needs."""
    needs: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, dependencies = line.partition(":")
        needs[path] = dependencies.split()
        paths[Path(path).name.partition(".")[0].replace("-", "_")] = path
    order: list[Path] = []
    for name in names:
        known = paths.get(name.replace("-", "_"))
        if known is None:
            raise LabError(f"{kernel.version} has no module {name}")
        # modules.dep names the deepest dependency last
        for each in [*reversed(needs[known]), known]:
            if each.endswith((".xz", ".zst", ".gz")):
                raise LabError(f"{kernel.version} has compressed modules, which init cannot load")
            if kernel.modules / each not in order:
                order.append(kernel.modules / each)
    return order


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr.strip()}")
    return done.stdout
