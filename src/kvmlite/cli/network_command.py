"""``kvmlite network``: what guests behind NAT have changed on this host."""

from __future__ import annotations

import click

from kvmlite.cli.listing import echo_json, echo_table

__all__ = ["network"]


@click.group(name="network")
def network() -> None:
    """List what guests behind NAT have changed on this host, and put back what killed ones have left."""


@network.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
def list_networks(as_json: bool, quiet: bool) -> None:
    """List the networks of guests behind NAT: interface, subnet, process."""
    from kvmlite.host.network.sweep import notes

    found = notes()
    if as_json:
        echo_json(
            [
                {"name": note.name, "subnet": note.subnet, "pid": note.pid, "is_running": note.is_alive()}
                for note in found
            ]
        )
    elif quiet:
        for note in found:
            click.echo(note.name)
    elif found:
        rows = [(note.name, note.subnet, str(note.pid), "runs" if note.is_alive() else "was killed") for note in found]
        echo_table([("NAME", "SUBNET", "PROCESS", "STATE"), *rows])


@network.command(name="sweep")
def sweep_networks() -> None:
    """Put back what guests have left whose process was killed, and print the names of their interfaces.

    The next guest with NAT does the same.
    """
    from kvmlite.host.network.sweep import sweep

    for name in sweep():
        click.echo(name)
