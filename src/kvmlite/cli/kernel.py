"""``kvmlite kernel``: the store of kernels that guests are started with."""

from __future__ import annotations

import click

from kvmlite.cli.listing import echo_fields, echo_json, echo_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.images.kernel_file import Kernel

__all__ = ["kernel"]


@click.group(name="kernel")
def kernel() -> None:
    """Add, list and remove the kernels that guests boot."""


@kernel.command()
@click.argument("specs", metavar="[SPEC]...", nargs=-1)
@click.option("--name", help="What to call it (default: its release).")
@click.option("--modules", metavar="DIR", help="Its modules, if they are not beside it or in /lib/modules.")
@click.option("--default", "is_default", is_flag=True, help="Make it the kernel that run takes when none is named.")
@click.option("--replace", is_flag=True, help="Take --name away from the kernel that has it.")
@click.option("-q", "--quiet", is_flag=True, help="Print the name only.")
def add(
    specs: tuple[str, ...], name: str | None, modules: str | None, is_default: bool, replace: bool, quiet: bool
) -> None:
    """Add kernels to the store.

    SPEC is a Debian package (NAME or NAME=VERSION, default linux-image-cloud-amd64; downloaded with apt, not installed),
    a .deb file, a bzImage or vmlinux, a kernel build tree, or a directory with an unpacked package.
    """
    from kvmlite.errors import ConfigError
    from kvmlite.images.kernel_source import DEFAULT_PACKAGE, add_kernel
    from kvmlite.images.store import KernelStore

    specs = specs or (DEFAULT_PACKAGE,)
    for option, value in (("--name", name), ("--modules", modules), ("--default", is_default or None)):
        if value is not None and len(specs) > 1:
            raise ConfigError(f"{option} is for one kernel, not {len(specs)}", hint="add them one by one")
    store = KernelStore()
    for spec in specs:
        added = add_kernel(
            store, spec, name=name, modules=modules, replace=replace, progress=None if quiet else _report
        )
        if is_default:
            store.set_default(added)
        click.echo((name or added.name) if quiet else f"{name or added.name}  {added.digest[:12]}  {added.source}")


def _report(line: str) -> None:
    click.echo(line, err=True)


@kernel.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
def ls(as_json: bool, quiet: bool) -> None:
    """List the kernels in the store; * marks the one that run takes."""
    from kvmlite.images.store import KernelStore

    store = KernelStore()
    kernels = store.kernels()
    for problem in store.broken:
        click.echo(f"warning: {problem}", err=True)
    default = store.default() if kernels else None
    digest = default.digest if default else ""
    if as_json:
        echo_json([_to_json(found, digest) for found in kernels])
    elif quiet:
        for found in kernels:
            click.echo(found.name)
    else:
        _echo_table(kernels, digest)


def _echo_table(kernels: tuple[Kernel, ...], default: str) -> None:
    rows = [("", "NAME", "RELEASE", "DIGEST", "MODULES", "SOURCE")]
    for found in kernels:
        mark, modules = "*" if found.digest == default else "", "yes" if found.modules_dir else "no"
        names = ",".join(found.names) or found.name
        rows.append((mark, names, found.release or "-", found.digest[:12], modules, found.source))
    echo_table(rows)


@kernel.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show what is known of a kernel: NAME is a name, release, package, digest or path."""
    from kvmlite.images.kernels import resolve
    from kvmlite.images.store import KernelStore

    found, default = resolve(name), KernelStore().default()
    fields = _to_json(found, default.digest if default else "")
    if as_json:
        echo_json(fields)
        return
    echo_fields(fields)


@kernel.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove kernels with all their names. Running guests are not disturbed."""
    from kvmlite.images.store import KernelStore

    store = KernelStore()
    found = {store.find(name).digest: store.find(name) for name in names}
    for removed in found.values():
        store.remove(removed)
        click.echo(removed.name)


@kernel.command()
@click.argument("name")
def default(name: str) -> None:
    """Make NAME the kernel that run takes when none is named."""
    from kvmlite.images.store import KernelStore

    store = KernelStore()
    store.set_default(store.find(name))


def _to_json(found: Kernel, default: str) -> dict[str, object]:
    import os

    return {
        "name": found.name,
        "names": list(found.names),
        "release": found.release,
        "digest": found.digest or None,
        "path": found.path,
        "size": os.stat(found.path).st_size,
        "modules_dir": found.modules_dir,
        "config": found.config,
        "source": found.source,
        "added": found.added or None,
        "default": found.digest != "" and found.digest == default,
    }
