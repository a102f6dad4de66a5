"""Root file systems for the image store: a directory, a tar, an OCI layout, a docker archive or a Debian suite.

What is inside is not trusted: tar, umoci and mmdebstrap see to it that nothing is written outside the working directory,
which only its owner can enter. As root they give each file its owner. An ordinary user gets the same image: every source
but a directory becomes a tar first, whose owners fakeroot remembers while tar unpacks it and mke2fs copies the files.
"""

from __future__ import annotations

import errno
import os
import stat

from kvmlite.errors import ConfigError, HostError, ImageError, UnsupportedError
from kvmlite.images.entries import Draft
from kvmlite.images.ext4 import make_ext4
from kvmlite.images.image import ImageConfig
from kvmlite.images.image_store import ImageStore, disk_in
from kvmlite.images.staging import storage_error
from kvmlite.images.tool import Ended, find_tool, is_full, run_tool, tool_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmlite.images.image import Image

__all__ = ["import_image"]

_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip", "gzip"),
    (b"\xfd7zXZ\x00", "xz", "xz-utils"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd"),
    (b"BZh", "bzip2", "bzip2"),
)
_EXTRACT = (
    "--extract", "--numeric-owner", "--same-owner", "--preserve-permissions", "--delay-directory-restore", "--xattrs",
    "--xattrs-include=*",
)  # fmt: skip
_PACKAGES = ("ca-certificates", "iproute2", "netbase", "procps")
"""What a root needs beside minbase to be of use: addresses, names of services, certificates, ps."""
_HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
_APT_SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources")
_DEBIAN_SPACE = 600 << 20
_SUITE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-")
_PACKAGE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789+-.:")
_USERS_HINT = "apt-get install uidmap, and see to it that /etc/subuid and /etc/subgid name this user; or be root"
_NO_IMPORT = "a disk image needs no import: kvmlite run ./FILE"
_KINDS = "a directory, a tar, oci:DIR[:TAG], docker-archive:FILE or debian:SUITE"


def import_image(
    store: ImageStore,
    name: str,
    source: str,
    *,
    size: int | None = None,
    packages: tuple[str, ...] = (),
    variant: str = "",
    replace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Image:
    """Make an ext4 image of ``source`` and put it into the store.

    Args:
        store: Where to.
        name: What to call it.
        source: One of the kinds above.
        size: Of the file system, bytes; what is needed and 1 GiB if None.
        packages: Further Debian packages.
        variant: Of mmdebstrap; ``minbase`` if empty.
        replace: Take ``name`` away from the image that has it.
        progress: Called with a line of text before something that takes time.

    Raises:
        ConfigError: There is no such source, it does not fit, or the name is taken.
        ImageError: The source is not what it has to be.
        UnsupportedError: A program is missing; the hint names its package.
        HostError: A download failed, or the disk is full; nothing is left behind.

    Thread: any. Blocks: seconds to minutes.
    """
    store.check_free(name, replace=replace)
    importer = _importer(source)
    if (packages or variant) and importer is not _from_debian:
        raise ConfigError(f"packages and a variant are for debian:SUITE, not for {source}")
    with store.staging() as staging:
        try:
            work = _Work(Draft(staging), progress or _say_nothing, packages, variant or "minbase")
            config = importer(work, source)
            work.report("making the file system")
            make_ext4(work.tree, disk_in(work.draft), size=size, wrap=work.wrap)
            os.chmod(disk_in(work.draft), 0o600)  # it holds files that only some users of the guest may read
        except HostError:
            raise
        except OSError as error:
            raise storage_error(error, f"cannot import {source} to {store.root}") from error
        return store.publish(work.draft, source=_describe(source), config=config, name=name, replace=replace)


class _Work:
    """An import on its way: the tree that becomes the file system, and how mke2fs has to look at it."""

    def __init__(self, draft: Draft, report: Callable[[str], None], packages: tuple[str, ...], variant: str) -> None:
        self.draft = draft
        self.report = report
        self.packages = packages
        self.variant = variant
        self.tree = os.path.join(draft.scratch, "root")
        self.wrap: tuple[str, ...] = ()

    def path(self, name: str) -> str:
        """Return a path in the scratch space."""
        return os.path.join(self.draft.scratch, name)

    def unpack(self, tar: str, what: str) -> None:
        """Unpack a tar into the tree. What it asks for outside is refused; GNU tar sees to links that lead there."""
        program = _decompressor(tar)
        os.mkdir(self.tree, 0o755)
        command = ["tar", *_EXTRACT, "--file", tar, "--directory", self.tree]
        if program:
            command.append(f"--use-compress-program={program}")
        if os.geteuid() != 0:
            state = self.path("owners")
            command = ["fakeroot", "-s", state, "--", *command]
            self.wrap = ("fakeroot", "-i", state, "--")
        done = run_tool(command, hint="apt-get install fakeroot tar")
        if done.returncode != 0:
            if is_full(done):
                raise tool_failure(f"cannot unpack {what}", done)
            complaint = _first_complaint(done.stderr)
            hint = _NO_IMPORT if "not look like a tar" in complaint else ""
            raise ImageError(f"tar refuses {what}: {complaint}", hint=hint)
        if self.wrap:
            _make_readable(self.tree)


def _make_readable(tree: str) -> None:
    """Let this user read and remove what the tar says nobody may; fakeroot remembers the true modes."""
    for parent, directories, files in os.walk(tree):
        for name in directories:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
        for name in files:
            path = os.path.join(parent, name)
            if not os.access(path, os.R_OK, follow_symlinks=False) and not os.path.islink(path):
                os.chmod(path, 0o600)


def _say_nothing(line: str) -> None:
    """Report no progress."""


def _importer(source: str) -> Callable[[_Work, str], ImageConfig]:
    """Return what imports a source, by its prefix, else by what the path is."""
    for prefix, importer in (("oci:", _from_oci), ("docker-archive:", _from_oci), ("debian:", _from_debian)):
        if source.startswith(prefix):
            return importer
    if os.path.isdir(source):
        return _from_directory
    if os.path.isfile(source):
        return _from_tar
    if os.path.exists(source):
        raise ConfigError(f"{source} is neither a directory nor a file", hint=f"give {_KINDS}")
    raise ConfigError(f"{source}: no such file or directory", hint=_hint_for(source))


def _hint_for(source: str) -> str:
    """What may be meant by a source that is none: a registry's image, or a Debian suite."""
    transport, is_remote, reference = source.partition("://")
    if is_remote:
        return f"nothing is fetched from registries; skopeo copy {transport}://{reference} oci:DIR:latest, then give oci:DIR"
    if source == "debian":
        return "write debian:bookworm, debian:trixie ..."
    return f"give {_KINDS}"


def _describe(source: str) -> str:
    return source if source.startswith("debian:") else _absolute(source)


def _absolute(source: str) -> str:
    """Make the path in a source absolute."""
    for prefix in ("oci:", "docker-archive:"):
        if source.startswith(prefix):
            return prefix + os.path.abspath(source.removeprefix(prefix))
    return os.path.abspath(source)


def _from_directory(work: _Work, source: str) -> ImageConfig:
    """As root, with its owners; as an ordinary user, as if all of it were root's."""
    work.tree = os.path.abspath(source)
    if os.geteuid() != 0:
        _check_fakeroot()
        work.wrap = ("fakeroot", "--")
    return ImageConfig()


def _from_tar(work: _Work, source: str) -> ImageConfig:
    work.report(f"unpacking {source}")
    work.unpack(os.path.abspath(source), source)
    if not os.listdir(work.tree):  # tar takes zeros for the end of an archive, and an empty disk image is all zeros
        raise ImageError(f"{source} has no files in it", hint=_NO_IMPORT)
    return ImageConfig()


def _decompressor(tar: str) -> str:
    """Return the program that unpacks a compressed tar, told by its first bytes; empty for a plain one."""
    with open(tar, "rb") as file:
        head = file.read(8)
    for magic, program, package in _COMPRESSIONS:
        if head.startswith(magic):
            if find_tool(program) is None:
                raise UnsupportedError(
                    f"no {program} on this host, which {tar} needs", hint=f"apt-get install {package}"
                )
            return program
    return ""


def _first_complaint(stderr: str) -> str:
    """Return the first line in which tar says what it did not do, without its own name."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    lines = [line.removeprefix(find_tool("tar") or "tar").removeprefix("tar").removeprefix(": ") for line in lines]
    serious = [line for line in lines if not line.startswith("Removing leading")]
    return (serious or lines or ["no reason given"])[0]


def _from_oci(work: _Work, source: str) -> ImageConfig:
    """skopeo brings any kind into one OCI layout and checks its digests, umoci puts the layers together."""
    work.report(f"reading {source}")
    done = run_tool(
        ["skopeo", "--insecure-policy", "--override-os", "linux", "copy", "-q", _absolute(source), "oci:layout:image"],
        hint="apt-get install skopeo",
        cwd=work.draft.scratch,
    )
    if done.returncode != 0:
        raise _skopeo_failure(source, done)
    from kvmlite.images.oci_layout import read_config

    config = read_config(work.path("layout"))
    if find_tool("umoci") is None:
        raise UnsupportedError("no umoci on this host", hint="apt-get install umoci")
    work.report("putting its layers together")
    unpack = ["umoci", "raw", "unpack", "--image", "layout:image", "root"]
    if os.geteuid() == 0:
        done = run_tool(unpack, hint="", cwd=work.draft.scratch)
    else:
        done = _in_user_namespace(
            f'{" ".join(unpack)} && tar --numeric-owner --xattrs --xattrs-include="*" -C root -cf root.tar .; '
            "code=$?; rm -rf root; exit $code",
            work.draft.scratch,
        )
    if done.returncode != 0:
        failure = tool_failure(f"umoci cannot unpack {source}", done)
        raise failure if is_full(done) else ImageError(str(failure))
    if os.geteuid() != 0:
        work.unpack(work.path("root.tar"), source)
    _provide_hosts(work.tree)
    return config


def _provide_hosts(tree: str) -> None:
    """Write /etc/hosts where an image has none or an empty one: it counts on whoever runs it. Follows no links."""
    try:
        etc = os.open(os.path.join(tree, "etc"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # no such directory, or a link: nobody will look for names there
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open("hosts", flags, 0o644, dir_fd=etc)
        with open(fd, "w", encoding="ascii") as file:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_size == 0 and found.st_nlink == 1:
                file.write(_HOSTS)
                os.fchmod(fd, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    finally:
        os.close(etc)


def _skopeo_failure(source: str, done: Ended) -> Exception:
    """The reason is in a line of key="value" fields."""
    _, found, message = done.stderr.rpartition('msg="')
    if not found or is_full(done):
        return tool_failure(f"skopeo cannot read {source}", done)
    return ImageError(f"cannot read {source}: {message.strip().rstrip(chr(34))}".replace('\\"', '"'))


def _check_user_namespace() -> None:
    if find_tool("newuidmap") is None:
        raise UnsupportedError("no newuidmap on this host: files of other users cannot be unpacked", hint=_USERS_HINT)


def _check_fakeroot() -> None:
    if find_tool("fakeroot") is None:
        raise UnsupportedError("no fakeroot on this host", hint="apt-get install fakeroot, or be root")


def _in_user_namespace(script: str, directory: str) -> Ended:
    """Run a shell script as root of a user namespace with all the ids that /etc/subuid gives this user."""
    _check_user_namespace()
    enter = ["unshare", "--user", "--map-root-user", "--map-auto", "--"]
    try:
        return run_tool([*enter, "sh", "-c", script], hint=_USERS_HINT, cwd=directory)
    except BaseException:  # some of the files are not this user's to remove
        run_tool([*enter, "rm", "-rf", "root"], hint=_USERS_HINT, cwd=directory)
        raise


def _from_debian(work: _Work, source: str) -> ImageConfig:
    suite = source.removeprefix("debian:")
    if not suite or set(suite) - _SUITE_CHARACTERS or not suite[0].isalnum():
        raise ConfigError(f"{suite!r} is no Debian suite", hint="write debian:bookworm, debian:trixie ...")
    for package in work.packages:
        if not package or set(package) - _PACKAGE_CHARACTERS or not package[0].isalnum():
            raise ConfigError(f"{package!r} is no name of a Debian package")
    _check_space(work.draft.scratch)
    is_root = os.geteuid() == 0
    if not is_root:  # before the minutes that mmdebstrap takes
        _check_fakeroot()
        _check_user_namespace()
    target = work.tree if is_root else work.path("root.tar")
    work.report(f"installing Debian {suite} (mmdebstrap)")
    command = [
        "mmdebstrap", f"--variant={work.variant}", f"--format={'directory' if is_root else 'tar'}",
        f"--include={','.join((*_PACKAGES, *work.packages))}",
        f"""--customize-hook=printf %s '{_HOSTS}' > "$1/etc/hosts" """,
        """--customize-hook=rm -f "$1/etc/resolv.conf" "$1/etc/hostname"; : > "$1/etc/resolv.conf" """,
        suite, target, *_own_sources(suite),
    ]  # fmt: skip
    # An ordinary user's mmdebstrap works as users whom our own directory keeps out.
    done = run_tool(command, hint="apt-get install mmdebstrap", env={"TMPDIR": work.draft.scratch} if is_root else None)
    if done.returncode != 0:
        raise tool_failure(f"mmdebstrap {suite} failed", done, prefixes=("E:",))
    if not is_root:
        work.unpack(target, source)
    return ImageConfig(env=("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",), command=("bash",))


def _check_space(directory: str) -> None:
    """apt has been seen to wait for ever on a disk that became full while it fetched package lists."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < _DEBIAN_SPACE:
        raise storage_error(
            OSError(errno.ENOSPC, ""),
            f"{free >> 20} MiB are free in {directory}, a Debian image takes {_DEBIAN_SPACE >> 20}",
        )


def _own_sources(suite: str) -> list[str]:
    """Return this host's own package sources, if it is of the same suite; else mmdebstrap takes Debian's."""
    try:
        with open("/etc/os-release", encoding="utf-8") as file:
            names = [line.partition("=")[2].strip().strip('"') for line in file if line.startswith("VERSION_CODENAME=")]
    except OSError:
        return []
    return [path for path in _APT_SOURCES if os.path.exists(path)] if suite in names else []
