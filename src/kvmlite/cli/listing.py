"""How commands print what they know: a table for people, JSON for programs."""

from __future__ import annotations

import click

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["echo_fields", "echo_json", "echo_table", "size_text"]


def echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first one the headings, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo(" ".join(cell.ljust(width + 1) for cell, width in zip(row, widths, strict=True)).rstrip())


def echo_fields(fields: Mapping[str, object]) -> None:
    """Print one ``key: value`` per line."""
    for key, value in fields.items():
        click.echo(f"{key + ':':13}{_to_text(value)}")


def echo_json(value: object) -> None:
    """Print a JSON document."""
    import json

    click.echo(json.dumps(value, indent=2))


def size_text(size: int) -> str:
    """Write bytes as a person would: ``1.5G``, ``203M``."""
    for unit, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.1f}".removesuffix(".0") + unit
    return str(size)


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)
