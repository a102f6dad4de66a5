"""``kvmlite volume``: disks with a name, kept from one run to the next."""

from __future__ import annotations

import click

from kvmlite.cli.listing import echo_fields, echo_json, echo_table, size_text
from kvmlite.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.images.volumes import Volume, VolumeStore
    from kvmlite.sandbox.volume_mount import VolumeMount

__all__ = ["parse_volume", "volume"]


def parse_volume(text: str) -> VolumeMount:
    """Read one ``--volume NAME:DST[:ro|rw]`` of ``kvmlite run``.

    Raises:
        ConfigError: It is not of this form, or there is no such volume.
    """
    from kvmlite.sandbox.volume_mount import open_volume

    name, *rest = text.split(":")
    if not name or not 1 <= len(rest) <= 2 or not rest[0].startswith("/") or rest[1:] not in ([], ["ro"], ["rw"]):
        raise ConfigError(f"--volume {text!r} is not of the form NAME:DST[:ro|rw]", hint="DST is a path in the guest")
    if "/" in name:
        raise ConfigError(f"--volume {text!r}: {name!r} cannot name a volume", hint="--mount shares a directory")
    return open_volume(name, rest[0], read_only=rest[1:] == ["ro"])


def _store() -> VolumeStore:
    from kvmlite.images.volumes import VolumeStore

    return VolumeStore()


def _size(text: str) -> int:
    from kvmlite.sizes import parse_size

    return parse_size(text, "SIZE")


@click.group(name="volume")
def volume() -> None:
    """Make, resize, convert, list and remove disks that outlast a run."""


@volume.command()
@click.argument("name")
@click.argument("size")
@click.option("--format", "format_", metavar="NAME", default="raw", help="raw, qcow2, vmdk, vdi or vhdx. Default raw.")
@click.option("--fs", "filesystem", metavar="TYPE", default="", help="Make a file system in it: ext4.")
def create(name: str, size: str, format_: str, filesystem: str) -> None:
    """Make an empty volume of SIZE (10G); it takes no space until it is written to."""
    click.echo(_line(_store().create(name, _size(size), format=format_, filesystem=filesystem)))


@volume.command()
@click.argument("name")
@click.argument("size")
@click.option("--shrink", is_flag=True, help="Allow a smaller SIZE: what lies behind it is lost.")
def resize(name: str, size: str, shrink: bool) -> None:
    """Make a volume SIZE large. A file system in it keeps its size: see resize2fs(8)."""
    click.echo(_line(_store().resize(name, _size(size), shrink=shrink)))


@volume.command()
@click.argument("name")
@click.argument("format_", metavar="FORMAT")
@click.option("--as", "target", metavar="NEW", help="Leave the volume as it is and call the other one NEW.")
def convert(name: str, format_: str, target: str | None) -> None:
    """Bring a volume into FORMAT: raw, qcow2, vmdk, vdi or vhdx."""
    click.echo(_line(_store().convert(name, format_, target=target)))


@volume.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
def ls(as_json: bool, quiet: bool) -> None:
    """List the volumes."""
    found = _store().volumes()
    if as_json:
        echo_json([_to_json(each) for each in found])
    elif quiet:
        for each in found:
            click.echo(each.name)
    else:
        rows = [("NAME", "FORMAT", "SIZE", "ON DISK", "IN USE")]
        for each in found:
            used = "yes" if each.is_used else "no"
            rows.append((each.name, each.format, size_text(each.size), size_text(each.allocated), used))
        echo_table(rows)


@volume.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show what is known of a volume, its path too."""
    fields = _to_json(_store().find(name))
    if as_json:
        echo_json(fields)
    else:
        echo_fields(fields)


@volume.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove volumes. One that a machine uses is not removed."""
    store = _store()
    for name in names:
        store.find(name)
    for name in dict.fromkeys(names):
        store.remove(name)
        click.echo(name)


def _line(made: Volume) -> str:
    return f"{made.name}  {made.format}  {size_text(made.size)}"


def _to_json(found: Volume) -> dict[str, object]:
    return {
        "name": found.name,
        "path": found.path,
        "format": found.format,
        "size": found.size,
        "allocated": found.allocated,
        "in_use": found.is_used,
    }
