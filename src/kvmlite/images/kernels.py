"""From what a user calls a kernel to the files it consists of."""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, ImageError
from kvmlite.images.kernel_file import Kernel, identify

__all__ = ["host_kernel", "kernel_at", "locate", "resolve"]

_ADD_HINT = "kvmlite kernel add downloads one; or pass the path of a bzImage or vmlinux"


def resolve(kernel: str | os.PathLike[str] | None = None) -> Kernel:
    """Return the kernel a user means.

    Args:
        kernel: A path (anything with a slash, or a file that exists), a name, release, package or digest of a kernel in
            the store, or None: the store's default, else the kernel this host itself runs.

    Raises:
        ConfigError: There is no such kernel; the hint says how to get one.
        ImageError: The file is no kernel for x86-64.
    """
    if kernel is None:
        return _default()
    text = os.fspath(kernel)
    if not text:
        raise ConfigError("the kernel's name is empty", hint=_ADD_HINT)
    if "/" in text or not isinstance(kernel, str):
        return kernel_at(text)
    from kvmlite.images.store import KernelStore

    try:
        return KernelStore().find(text)
    except ConfigError:
        if os.path.exists(text):
            return kernel_at(text)
        raise


def _default() -> Kernel:
    from kvmlite.images.store import KernelStore

    found = KernelStore().default()
    if found is not None:
        return found
    try:
        return host_kernel()
    except ImageError as error:
        raise ConfigError(f"no kernel to run: the store is empty, and {error}", hint="kvmlite kernel add") from error


def host_kernel() -> Kernel:
    """Return the kernel this host runs, if its file can be read.

    Raises:
        ImageError: It is not there, or not readable (some distributions keep it to root).
    """
    release = os.uname().release
    candidates = (f"/boot/vmlinuz-{release}", f"/lib/modules/{release}/vmlinuz", f"/usr/lib/modules/{release}/vmlinuz")
    for path in candidates:
        if os.access(path, os.R_OK):
            return kernel_at(path)
    for path in candidates:
        if os.path.exists(path):
            raise ImageError(f"the host's own kernel {path} is not readable for this user")
    raise ImageError(f"the host has no {candidates[0]}")


def kernel_at(path: str) -> Kernel:
    """Return the kernel in a file, or in a directory that holds one (an unpacked package, a build tree).

    Its modules and config are looked for beside it, then in ``/lib/modules/<release>`` and ``/boot``.

    Raises:
        ImageError: There is no kernel for x86-64.
    """
    image = locate(path) if os.path.isdir(path) else path
    found = identify(image)
    where = os.path.dirname(os.path.realpath(image))
    tree = _build_tree(where)
    has_modules = tree is not None and os.path.isfile(os.path.join(tree, "modules.order"))
    return Kernel(
        path=os.path.abspath(image),
        release=found.release,
        modules_dir=tree if has_modules else _find_modules(where, found.release),
        config=_find_config(where, tree, found.release),
        name=path,
        source=f"file:{os.path.abspath(image)}",
    )


def locate(directory: str) -> str:
    """Return the kernel image in a build tree (``arch/x86/boot/bzImage``) or an unpacked package (``boot/vmlinuz-*``).

    Raises:
        ImageError: There is none, or more than one.
    """
    for name in ("arch/x86/boot/bzImage", "vmlinux"):
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            return path
    found = []
    for subdirectory in (".", "boot"):
        parent = os.path.join(directory, subdirectory)
        try:
            names = sorted(os.listdir(parent))
        except (NotADirectoryError, FileNotFoundError):
            continue
        except OSError as error:
            raise ImageError(f"cannot read {parent}: {error.strerror}") from error
        found += [os.path.normpath(os.path.join(parent, name)) for name in names if _is_image_name(name)]
    if len(found) > 1:
        raise ImageError(
            f"{directory} has {len(found)} kernels: {', '.join(found)}", hint="pass the path of one of them"
        )
    if not found:
        raise ImageError(
            f"{directory} has no kernel: no arch/x86/boot/bzImage, no vmlinux, no boot/vmlinuz-*",
            hint="for a build tree, run make bzImage first",
        )
    return found[0]


def _is_image_name(name: str) -> bool:
    return name == "vmlinuz" or name.startswith(("vmlinuz-", "vmlinux-"))


def _build_tree(directory: str) -> str | None:
    """Return the root of the build tree that ``directory`` (of a kernel image) belongs to, or None."""
    root = directory
    for suffix in ("/arch/x86/boot", "/arch/x86_64/boot"):
        root = root.removesuffix(suffix)
    return root if os.path.isfile(os.path.join(root, "include/config/kernel.release")) else None


def _find_modules(where: str, release: str) -> str | None:
    if not release:
        return None
    parents = (where, os.path.dirname(where), os.path.join(where, "modules"), "/", "/usr")
    candidates = [os.path.join(parent, "lib/modules", release) for parent in parents]
    candidates += [os.path.join(os.path.dirname(where), "usr/lib/modules", release)]
    if os.path.basename(where) == release:
        candidates.insert(0, where)
    for path in candidates:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("modules.order", "modules.dep")):
            return path
    return None


def _find_config(where: str, tree: str | None, release: str) -> str | None:
    if tree:
        candidates = [os.path.join(tree, ".config")]
    elif release:
        beside = (f"{where}/config-{release}", f"{where}/config", f"{os.path.dirname(where)}/boot/config-{release}")
        candidates = [*beside, f"/lib/modules/{release}/config", f"/boot/config-{release}"]
    else:
        candidates = []
    return next((path for path in candidates if os.access(path, os.R_OK)), None)
