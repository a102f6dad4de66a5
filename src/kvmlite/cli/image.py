"""``kvmlite image``: the store of root file systems that ``run IMAGE`` starts from."""

from __future__ import annotations

import os

import click

from kvmlite.cli.listing import echo_fields, echo_json, echo_table, size_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.images.image import Image

__all__ = ["image"]


@click.group(name="image")
def image() -> None:
    """Import, list and remove the root file systems that guests run."""


@image.command(name="import")
@click.argument("name")
@click.argument("source")
@click.option("--size", metavar="SIZE", help="Of the file system: 4G. Default: what is needed and 1G.")
@click.option(
    "--include", "packages", metavar="PACKAGE", multiple=True, help="Further Debian packages; debian:SUITE only."
)
@click.option(
    "--variant", metavar="NAME", default="", help="Variant of mmdebstrap, default minbase; debian:SUITE only."
)
@click.option("--replace", is_flag=True, help="Take NAME away from the image that has it.")
@click.option("-q", "--quiet", is_flag=True, help="Print the name only.")
def import_(
    name: str, source: str, size: str | None, packages: tuple[str, ...], variant: str, replace: bool, quiet: bool
) -> None:
    """Make an image NAME of SOURCE.

    SOURCE is a directory, a tar (plain, .gz, .xz, .zst, .bz2), oci:DIR[:TAG] (an OCI layout), docker-archive:FILE (what
    docker save writes), or debian:SUITE (made with mmdebstrap).
    """
    from kvmlite.images.image_store import ImageStore
    from kvmlite.images.root_source import import_image
    from kvmlite.sizes import parse_size

    made = import_image(
        ImageStore(),
        name,
        source,
        size=None if size is None else parse_size(size, "--size"),
        packages=tuple([word for text in packages for word in text.split(",")]),
        variant=variant,
        replace=replace,
        progress=None if quiet else _report,
    )
    click.echo(name if quiet else f"{name}  {made.digest[:12]}  {size_text(_taken(made))}")


def _report(line: str) -> None:
    click.echo(line, err=True)


@image.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
def ls(as_json: bool, quiet: bool) -> None:
    """List the images in the store."""
    from kvmlite.images.image_store import ImageStore

    store = ImageStore()
    images = store.images()
    for problem in store.broken:
        click.echo(f"warning: {problem}", err=True)
    if as_json:
        echo_json([_to_json(found) for found in images])
    elif quiet:
        for found in images:
            click.echo(found.name)
    else:
        rows = [("NAME", "DIGEST", "SIZE", "ON DISK", "SOURCE")]
        for found in images:
            names = ",".join(found.names) or found.name
            rows.append((names, found.digest[:12], size_text(found.size), size_text(_taken(found)), found.source))
        echo_table(rows)


@image.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show what is known of an image: NAME is a name or the beginning of a digest."""
    from kvmlite.images.image_store import ImageStore

    fields = _to_json(ImageStore().find(name))
    if as_json:
        echo_json(fields)
    else:
        echo_fields(fields)


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove images with all their names. Running guests and volumes made of them are not disturbed."""
    from kvmlite.images.image_store import ImageStore

    store = ImageStore()
    found = [store.find(name) for name in names]
    for removed in {each.digest: each for each in found}.values():
        store.remove(removed)
        click.echo(removed.name)


def _taken(found: Image) -> int:
    """Bytes on the disk: the file is sparse."""
    return os.stat(found.path).st_blocks * 512


def _to_json(found: Image) -> dict[str, object]:
    return {
        "name": found.name,
        "names": list(found.names),
        "digest": found.digest,
        "path": found.path,
        "size": found.size,
        "allocated": _taken(found),
        "filesystem": "ext4",
        "source": found.source,
        "added": found.added,
        "env": list(found.config.env),
        "entrypoint": list(found.config.entrypoint),
        "cmd": list(found.config.command),
        "workdir": found.config.workdir,
        "user": found.config.user,
    }
