"""What ``kvmlite kernel add`` accepts, and how each becomes an entry of the store.

A specification is a Debian package (``NAME`` or ``NAME=VERSION``; metapackages are followed to the kernel they stand
for), a ``.deb`` file, a kernel file, a build tree, or a directory with an unpacked package.
"""

from __future__ import annotations

import os

from kvmlite.errors import ConfigError, HostError, ImageError, UnsupportedError
from kvmlite.images.debian import describe_deb, download, find_package, unpack
from kvmlite.images.entries import Draft, check_name
from kvmlite.images.kernel_file import Kernel, identify
from kvmlite.images.kernels import kernel_at
from kvmlite.images.module_file import load_module
from kvmlite.images.modules import ModuleTree
from kvmlite.images.staging import storage_error
from kvmlite.images.store import KernelStore, modules_in
from kvmlite.images.tool import find_tool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT_PACKAGE", "add_kernel"]

DEFAULT_PACKAGE = "linux-image-cloud-amd64"
_INDEX_FILES = (
    "modules.dep", "modules.order", "modules.builtin", "modules.builtin.modinfo", "modules.softdep", "modules.alias",
)  # fmt: skip


def add_kernel(
    store: KernelStore,
    spec: str,
    *,
    name: str | None = None,
    modules: str | None = None,
    replace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Kernel:
    """Add the kernel that ``spec`` stands for to the store.

    Args:
        store: Where to.
        spec: A package, or a path (see above).
        name: What to call it; its release if None.
        modules: Its modules, ``lib/modules/<release>`` or a directory that has this; found beside the kernel if None.
        replace: Take ``name`` away from the kernel that has it.
        progress: Called with a line of text before something that takes time.

    Raises:
        ConfigError: There is no such file or package, or the name is taken.
        ImageError: It is no kernel for x86-64, or the modules are not this kernel's.
        HostError: The download failed, or the disk is full; nothing is left behind.

    Thread: any. Blocks for seconds: download, unpacking, disk.
    """
    if name is not None:
        check_name(name, "kernel")
    report = progress or _say_nothing
    with store.staging() as staging:
        try:
            draft = Draft(staging)
            kernel, source = _open(spec, draft, report)
            if modules is not None:
                kernel = _with_modules(kernel, modules)
            _fill(draft, kernel, report)
        except HostError:
            raise
        except OSError as error:
            raise storage_error(error, f"cannot add {spec} to {store.root}") from error
        added = store.publish(draft, release=kernel.release, source=source, spec=spec, name=name, replace=replace)
    _unpack_ahead(added, report)
    return added


def _unpack_ahead(kernel: Kernel, report: Callable[[str], None]) -> None:
    """Unpack the kernel's payload into the cache now, so that the first boot need not."""
    from kvmlite.boot import open_kernel
    from kvmlite.boot.unpack import unpack
    from kvmlite.paths import vmlinux_cache

    with open_kernel(kernel.path) as image:
        if image.bzimage is None or not image.bzimage.payload_size:
            return
        report(f"unpacking the kernel of {kernel.name}")
        try:
            unpack(image, vmlinux_cache()).close()
        except UnsupportedError as error:  # it boots all the same, and unpacks itself in the guest
            report(f"{error}: it will unpack itself at each boot, which is slower")


def _say_nothing(line: str) -> None:
    """Report no progress."""


def _open(spec: str, draft: Draft, report: Callable[[str], None]) -> tuple[Kernel, str]:
    """Return the kernel a specification stands for, as files on this host, and its source for the manifest."""
    is_path = "/" in spec or os.path.exists(spec) or spec.endswith(".deb")
    if is_path and not os.path.exists(spec):
        raise ConfigError(f"{spec}: no such file or directory")
    if is_path and not (spec.endswith(".deb") and os.path.isfile(spec)):
        kernel = kernel_at(spec)
        kind = "tree" if os.path.isdir(spec) else "file"
        return kernel, f"{kind}:{os.path.abspath(spec)}"
    if is_path:
        deb, package = spec, describe_deb(spec)
    else:
        package = find_package(spec, depends_prefix="linux-image-")
        report(f"downloading {package.name} {package.version} ({package.size / 1e6:.1f} MB)")
        deb = download(package, draft.scratch)
    unpacked = os.path.join(draft.scratch, "unpacked")
    report(f"unpacking {package.name}")
    unpack(deb, unpacked)
    try:
        kernel = kernel_at(unpacked)
    except ImageError as error:
        raise ImageError(
            f"package {package.name} {package.version} has no kernel: {error}".replace(unpacked, "it")
        ) from error
    return kernel, f"deb:{package.name}={package.version}"


def _with_modules(kernel: Kernel, directory: str) -> Kernel:
    if not kernel.release:
        raise ConfigError(f"{kernel.path} does not tell its release: it cannot have modules")
    candidates = [
        os.path.join(directory, "lib/modules", kernel.release),
        os.path.join(directory, kernel.release),
        directory,
    ]
    for path in candidates:
        if any(
            os.path.isfile(os.path.join(path, name)) for name in ("modules.order", "modules.dep", "modules.builtin")
        ):
            return Kernel(
                path=kernel.path, release=kernel.release, modules_dir=path, config=kernel.config, name=kernel.name
            )
    raise ImageError(
        f"{directory} holds no modules: neither modules.order nor modules.dep there or in lib/modules/{kernel.release}",
        hint="give the directory that make modules_install made",
    )


def _fill(draft: Draft, kernel: Kernel, report: Callable[[str], None]) -> None:
    """Bring a kernel's files into the draft: renamed if they lie in its scratch space, else copied."""
    image = "vmlinuz" if identify(kernel.path).is_bzimage else "vmlinux"
    _take(draft, kernel.path, os.path.join(draft.path, image), mode=0o644)
    if kernel.config:
        _take(draft, kernel.config, os.path.join(draft.path, "config"), mode=0o644)
    if not kernel.modules_dir or not kernel.release:
        return
    target = modules_in(draft, kernel.release)
    tree = ModuleTree(kernel.modules_dir)
    _check_release(tree, kernel.release)
    if kernel.modules_dir.startswith(draft.scratch + os.sep):
        os.makedirs(os.path.dirname(target))
        os.rename(kernel.modules_dir, target)
        return
    report(f"copying {len(tree.paths())} modules")
    if os.path.isfile(os.path.join(kernel.modules_dir, "include/config/kernel.release")):
        _collect_built(tree, target)
        _run_depmod(draft, kernel.release, report)
    else:
        _copy_installed(tree, target)


def _take(draft: Draft, source: str, target: str, *, mode: int) -> None:
    import shutil

    if os.path.realpath(source).startswith(os.path.realpath(draft.scratch) + os.sep):
        os.rename(os.path.realpath(source), target)
    else:
        shutil.copyfile(source, target)
    os.chmod(target, mode)


def _check_release(tree: ModuleTree, release: str) -> None:
    """Raise ImageError if the modules (the first one speaks for all) are not of this kernel."""
    for path in tree.paths()[:1]:
        load_module(os.path.join(tree.directory, path), release=release)


def _copy_installed(tree: ModuleTree, target: str) -> None:
    """Copy modules in the layout of ``make modules_install``: the files and what ``depmod`` made."""
    for path in (*_INDEX_FILES, *tree.paths()):
        source = os.path.join(tree.directory, path)
        if path not in _INDEX_FILES or os.path.isfile(source):
            _copy(source, os.path.join(target, path))


def _collect_built(tree: ModuleTree, target: str) -> None:
    """Copy modules out of a build tree into the layout that ``make modules_install`` would make."""
    for path in tree.paths():
        _copy(os.path.join(tree.directory, path), os.path.join(target, "kernel", path))
    os.makedirs(target, exist_ok=True)
    with open(os.path.join(target, "modules.order"), "w", encoding="utf-8") as file:
        file.writelines([f"kernel/{path}\n" for path in tree.paths()])
    with open(os.path.join(target, "modules.builtin"), "w", encoding="utf-8") as file:
        file.writelines([f"kernel/{name}.ko\n" for name in sorted(tree.builtin)])


def _copy(source: str, target: str) -> None:
    import shutil

    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ImageError(
            f"module {source} is listed but not there", hint="install the kernel's modules again"
        ) from error


def _run_depmod(draft: Draft, release: str, report: Callable[[str], None]) -> None:
    """Let ``depmod`` index the modules if this host has it; without, each module's own record is read when it is needed."""
    import subprocess

    program = find_tool("depmod")
    if program is None:
        return
    done = subprocess.run(
        [program, "-b", os.path.join(draft.path, "modules"), release],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        report(f"{program} failed, going on without its index: {done.stderr.strip().splitlines()[-1:]}")
