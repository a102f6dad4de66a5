"""The lab's disks: ext4 images made from directories, never mounted on this machine.

Every image is attached as a throw-away copy (QEMU ``snapshot=on``), so one file in the cache
serves any number of labs, and the lab sees a plain writable ext4 without an overlay.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit.paths import CACHE, VENV, LabError, locked

SUITE = "bookworm"
#: Debian minimal plus what tests and benchmarks call by name.
PACKAGES = (
    "python3", "qemu-system-x86", "qemu-utils", "iproute2", "iputils-ping", "nftables",
    "busybox-static", "e2fsprogs", "procps", "strace", "socat", "iperf3", "fio", "passt",
    "kmod", "mount", "less", "tcpdump", "netcat-openbsd", "ca-certificates",
    "dnsmasq-base", "dmsetup", "sockperf", "xfsprogs",
)  # fmt: skip
#: Change it when the recipe below changes in a way that its text does not show.
RECIPE_VERSION = 1
#: Size of the root disk as the lab sees it; the file is sparse.
ROOT_SIZE_MIB = 16384

_HOSTS = "127.0.0.1 localhost\n127.0.1.1 lab\n::1 localhost ip6-localhost ip6-loopback\n"
_SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources")


@dataclass(frozen=True, slots=True)
class Contents:
    """What a directory holds, without reading any file: enough to size and to name an image."""

    size: int
    count: int
    digest: str


def survey(root: Path) -> Contents:
    """Sum up a file or directory. The digest changes when a name, size, mode or mtime does."""
    digest = hashlib.sha256(os.fsencode(root))
    size = count = 0
    for path in _paths_below(root):
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            continue
        size += (info.st_size + 4095) & ~4095
        count += 1
        entry = f"\0{info.st_mode} {info.st_size} {info.st_mtime_ns}\0"
        digest.update(os.fsencode(path) + entry.encode())
    return Contents(size, count, digest.hexdigest()[:16])


def _paths_below(root: Path) -> Iterator[str]:
    if not root.is_dir():
        yield os.fspath(root)
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted([*names, *files]):
            yield os.path.join(directory, name)


def make_ext4(source: Path, target: Path, contents: Contents, spare_mib: int) -> None:
    """Make an ext4 image of a directory, with ``spare_mib`` of free space.

    No journal: a lab's disk is never mounted twice. No lazy initialisation: it would be the
    lab's kernel that finishes it, on every start.
    """
    size_mib = contents.size * 11 // 10 // 2**20 + spare_mib + 16
    inodes = contents.count + 2000 + spare_mib * 16
    command = [
        "mke2fs", "-q", "-t", "ext4", "-d", os.fspath(source), "-m", "0", "-N", str(inodes),
        "-O", "^has_journal,^resize_inode,^metadata_csum", "-E", "lazy_itable_init=0,root_owner=0:0",
        os.fspath(target), f"{size_mib}M",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        raise LabError(f"mke2fs of {source}: {done.stderr.strip()}")


def directory_image(source: Path, kind: str, spare_mib: int = 0) -> Path:
    """Return the cached image of a directory as it is now."""
    return _cached_image(source, kind, survey(source).digest, spare_mib)


def kernel_image(package: Path) -> Path:
    """Return the cached image of an unpacked kernel package, which never changes once it is there."""
    info = package.stat()
    return _cached_image(package, "kernel", f"{info.st_ino:x}-{info.st_mtime_ns:x}")


def venv_image() -> Path | None:
    """Return the image of the project's virtual environment, or None if there is none.

    Installing or removing a package changes the directories looked at here; walking all of the
    5,000 files would cost each run 50 ms.
    """
    sites = sorted(VENV.glob("lib/python3.*/site-packages"))
    if not sites:
        return None
    digest = hashlib.sha256()
    for directory in (VENV / "bin", *sites, *sorted(sites[0].glob("*.dist-info"))):
        digest.update(f"{directory}\0{directory.stat().st_mtime_ns}\0".encode())
    return _cached_image(VENV, "venv", digest.hexdigest()[:16])


def _cached_image(source: Path, kind: str, stamp: str, spare_mib: int = 0) -> Path:
    """Make the image unless one with this stamp is there; it replaces that of an older state."""
    place = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    image = CACHE / f"{kind}-{place}-{stamp}.ext4"
    if not image.exists():
        with locked(f"{kind}-{place}"):
            if not image.exists():
                scratch = image.with_suffix(".new")
                make_ext4(source, scratch, survey(source), spare_mib)
                for old in CACHE.glob(f"{kind}-{place}-*.ext4"):
                    old.unlink()  # a lab that runs on it has it open
                scratch.rename(image)
    return image


def base_image() -> Path:
    """Where the root disk is, or will be once it has been built."""
    recipe = repr((SUITE, PACKAGES, RECIPE_VERSION, ROOT_SIZE_MIB))
    return CACHE / f"base-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.ext4"


def build_base() -> None:
    """Build the root disk with mmdebstrap: one to two minutes, 250 MB of downloads."""
    image = base_image()
    if os.geteuid() != 0:
        raise LabError("the root disk has to be built as root: run sudo scripts/setup lab")
    with locked("base"):
        if image.exists():
            return
        scratch = Path(tempfile.mkdtemp(dir=CACHE, prefix=".base-"))
        try:
            root = scratch / "root"
            _debootstrap(root)
            _configure(root)
            target = scratch / "image"
            make_ext4(root, target, survey(root), ROOT_SIZE_MIB)
            for old in CACHE.glob("base-*.ext4"):
                old.unlink()
            target.rename(image)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _debootstrap(root: Path) -> None:
    excluded = ("man", "locale", "doc", "info", "bug", "lintian")
    release = Path("/etc/os-release").read_text()
    # this machine's own mirrors, if it is the same Debian; else mmdebstrap's default
    sources = [path for path in _SOURCES if SUITE in release and Path(path).exists()]
    command = [
        "mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in excluded),
        '--aptopt=APT::Install-Recommends "false"', SUITE, str(root), *sources,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise LabError(f"mmdebstrap: exit {done.returncode}\n{tail}")


def _configure(root: Path) -> None:
    """Add what the lab's init counts on, and what makes a bare Debian pleasant."""
    (root / "etc/hostname").write_text("lab\n")
    (root / "etc/hosts").write_text(_HOSTS)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").touch()
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    (root / "etc/modprobe.d/lab.conf").write_text("options kvm ignore_msrs=0\n")
