"""Files out of Debian packages: found and downloaded with apt, unpacked with dpkg-deb, never installed.

Works for any user: apt's package lists are read where they are, the download goes to a directory of ours.
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError, ImageError, UnsupportedError
from kvmlite.images.staging import storage_error
from kvmlite.images.tool import run_tool, tool_failure
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Package", "describe_deb", "download", "fetch_file", "find_package", "is_package_name", "unpack"]

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789+-.")
_VERSION_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-~:")
_MAX_METAPACKAGES = 4
_NO_APT = (
    "give a kernel file, a .deb, an unpacked package or a build tree instead: kvmlite kernel add /boot/vmlinuz-..."
)
_APT_OPTIONS = ("-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A Debian package in one version; ``size`` is that of its file in bytes (0 if not known)."""

    name: str
    version: str
    size: int = 0


def is_package_name(text: str) -> bool:
    """Tell whether ``text`` has the form ``NAME`` or ``NAME=VERSION`` of a Debian package."""
    name, equals, version = text.partition("=")
    is_name = len(name) > 1 and name[0].isalnum() and not set(name) - _NAME_CHARACTERS
    return is_name and bool(version) == bool(equals) and not set(version) - _VERSION_CHARACTERS


def find_package(spec: str, *, depends_prefix: str = "") -> Package:
    """Look a package up in apt's lists.

    Args:
        spec: ``NAME`` or ``NAME=VERSION``.
        depends_prefix: Follow metapackages: while the package depends on one whose name starts so, take that one.

    Raises:
        ConfigError: apt knows no such package.
        UnsupportedError: There is no apt on this host.
    """
    for _ in range(_MAX_METAPACKAGES):
        fields = _show(spec)
        needed = [word.strip() for word in fields.get("Depends", "").split(",")]
        following = [word for word in needed if depends_prefix and word.startswith(depends_prefix)]
        if not following:
            return Package(name=fields["Package"], version=fields["Version"], size=int(fields.get("Size", "0") or 0))
        name, _, condition = following[0].partition(" ")
        version = condition.strip("( )").removeprefix("=").strip()
        spec = f"{name}={version}" if condition.startswith("(= ") else name
    raise ImageError(f"package {spec}: more than {_MAX_METAPACKAGES} metapackages in a row")


def _show(spec: str) -> dict[str, str]:
    if not is_package_name(spec):
        raise ConfigError(f"{spec!r} is no package name and no file", hint=_NO_APT)
    try:
        text = _run(["apt-cache", *_APT_OPTIONS, "show", "--no-all-versions", spec])
    except HostError as error:
        raise _unknown_package(spec) from error
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if not line and fields:
            break
        if colon and not line.startswith(" "):
            fields[key] = value.strip()
    if "Package" not in fields or "Version" not in fields:
        raise _unknown_package(spec)
    return fields


def _unknown_package(spec: str) -> ConfigError:
    import difflib

    known = _run(["apt-cache", "pkgnames", spec.partition("=")[0][:11]]).split()
    if not known and not _run(["apt-cache", "pkgnames", "base-"]):
        return ConfigError(f"apt knows no package {spec}: it has no package lists", hint="apt-get update")
    plain = [name for name in known if not name.endswith(("-dbg", "-unsigned"))]
    close = difflib.get_close_matches(spec, plain, n=3, cutoff=0.7)
    return ConfigError(f"apt knows no package {spec}", hint=f"did you mean {' or '.join(close)}?" if close else "")


def download(package: Package, directory: str) -> str:
    """Download a package into ``directory`` and return the path of the ``.deb``.

    Raises:
        HostError: The download failed, or there is no room.
    """
    _run(["apt-get", "-qq", *_APT_OPTIONS, "download", f"{package.name}={package.version}"], cwd=directory)
    found = [name for name in os.listdir(directory) if name.endswith(".deb")]
    if len(found) != 1:
        raise HostError(f"apt-get download {package.name} left {len(found)} packages in {directory}")
    return os.path.join(directory, found[0])


def describe_deb(deb: str) -> Package:
    """Return the name and version of a ``.deb`` file. Raises ImageError if it is none."""
    try:
        text = _run(["dpkg-deb", "-f", deb, "Package", "Version"])
    except HostError as error:
        raise ImageError(f"{deb} is not a Debian package: {error}") from error
    fields = dict([line.split(": ", 1) for line in text.splitlines() if ": " in line])
    if len(fields) != 2:
        raise ImageError(f"{deb} is not a Debian package: it has no name and version")
    return Package(name=fields["Package"], version=fields["Version"])


def unpack(deb: str, directory: str) -> None:
    """Unpack the files of a package below ``directory``, which is made. Runs nothing of the package."""
    _run(["dpkg-deb", "-x", deb, directory])


def fetch_file(
    package: str, members: tuple[str, ...], target: str, *, progress: Callable[[str], None] | None = None
) -> None:
    """Download a package and keep one file of it.

    Args:
        package: Its name.
        members: Where the file may be in the package; the first that exists is taken.
        target: Where to put it; its directory is made. Replaced atomically.
        progress: Called with a line of text before the download.
    """
    from kvmlite.images.staging import Staging, sweep, sync_file

    found = find_package(package)
    if progress:
        progress(f"downloading {found.name} {found.version} ({found.size / 1e6:.1f} MB)")
    parent = os.path.dirname(target)
    sweep(parent)
    with Staging(parent) as staging:
        tree = os.path.join(staging.path, "tree")
        unpack(download(found, staging.path), tree)
        for member in members:
            path = os.path.join(tree, member)
            if os.path.isfile(path) and not os.path.islink(path):
                try:
                    sync_file(path)
                    os.rename(path, target)
                except OSError as error:
                    raise storage_error(error, f"cannot write {target}") from error
                return
    raise ImageError(f"package {found.name} {found.version} has none of {', '.join(members)}")


def _run(command: list[str], cwd: str | None = None) -> str:
    """Run a tool of the package system and return its output; the error is its own last complaint, one line."""
    try:
        ended = run_tool(command, hint=_NO_APT, cwd=cwd)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}: Debian packages cannot be fetched", hint=_NO_APT) from error
    if ended.returncode != 0:
        subcommand = next(word for word in command[1:] if word.isalpha() or word in ("-x", "-f"))
        raise tool_failure(f"{command[0]} {subcommand} failed", ended, prefixes=("E:", "dpkg-deb: error"))
    return ended.stdout
