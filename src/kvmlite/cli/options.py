"""Options of a subcommand as a table: read plainly on the start path, turned into click options otherwise.

Values stay strings here. What they mean is decided once, after reading, by the same code for both ways.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Values = dict[str, Any]  # str, bool or list[str] by the option's kind; "image": str; "command": list[str]

VALUE = "value"
FLAG = "flag"
MANY = "many"


class Option:
    """One option.

    Args:
        flags: ``("--memory", "-m")``; the first one, without dashes, names it.
        kind: ``VALUE`` (str, default "" unless given), ``FLAG`` (bool) or ``MANY`` (list of str).
        metavar, help: For ``--help``.
    """

    __slots__ = ("default", "flags", "help", "kind", "metavar", "name")

    def __init__(self, *flags: str, kind: str = VALUE, metavar: str = "", help: str = "", default: str = "") -> None:
        self.flags = flags
        self.name = flags[0].lstrip("-").replace("-", "_")
        self.kind = kind
        self.metavar = metavar
        self.help = help
        self.default = default

    def initial(self) -> Any:
        """The value when the option is not given."""
        if self.kind == FLAG:
            return False
        return [] if self.kind == MANY else self.default


def read_plain(options: Sequence[Option], arguments: Sequence[str]) -> Values | None:
    """Read ``[image] [--option value | --option=value | --flag]... [-- command...]``, the image anywhere before ``--``.

    Returns:
        The values, ``image`` and ``command``, or None for anything that is not exactly of this form: click then deals with it.
    """
    by_flag = {flag: option for option in options for flag in option.flags}
    values: Values = {option.name: option.initial() for option in options}
    values["image"], values["command"] = "", []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            values["command"] = list(arguments[position:])
            return values
        flag, has_value, value = argument.partition("=") if argument.startswith("--") else (argument, "", "")
        if argument and not argument.startswith("-") and not values["image"]:
            values["image"] = argument
            continue
        option = by_flag.get(flag)
        if option is None or (option.kind == FLAG and has_value):
            return None
        if option.kind == FLAG:
            values[option.name] = True
            continue
        if not has_value:
            if position == len(arguments) or arguments[position].startswith("-"):
                return None
            value = arguments[position]
            position += 1
        if option.kind == VALUE and not value:
            return None
        if option.kind == MANY:
            values[option.name].append(value)
        else:
            values[option.name] = value
    return values


def as_click(name: str, options: Sequence[Option], run: Callable[[Values], int], help: str, **extra: Any) -> Any:
    """The same table as a click command."""
    import click

    class Command(click.Command):
        """Splits off the command, which begins at ``--`` and nowhere else, before click looks at the options."""

        def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
            end = args.index("--") if "--" in args else len(args)
            ctx.meta["command"] = args[end + 1 :]
            return super().parse_args(ctx, args[:end])

    def callback(**given: Any) -> None:
        values = {option.name: given[option.name] for option in options}
        for option in options:
            if option.kind == VALUE:
                if values[option.name] == "":  # a variable that was never set must not mean "the default"
                    raise click.UsageError(f"{option.flags[0]} is empty")
                values[option.name] = values[option.name] or ""
            if option.kind == MANY:
                values[option.name] = list(values[option.name])
        if len(given["image"]) > 1:
            image, *rest = given["image"]
            raise click.UsageError(f"a command goes behind --: kvmlite {name} {image} -- {' '.join(rest)}")
        values["image"] = "".join(given["image"])
        if given["image"] == ("",):
            raise click.UsageError("IMAGE is empty")
        values["command"] = click.get_current_context().meta["command"]
        raise SystemExit(run(values))

    parameters: list[click.Parameter] = []
    for option in options:
        attributes: dict[str, Any] = {"help": option.help}
        if option.kind == FLAG:
            attributes["is_flag"] = True
        else:
            attributes.update(metavar=option.metavar or None, type=str, multiple=option.kind == MANY)
            if option.kind == VALUE:
                attributes["default"] = option.default or None
        parameters.append(click.Option([*option.flags, option.name], **attributes))
    parameters.append(click.Argument(["image"], nargs=-1, metavar="[IMAGE] [-- CMD...]"))
    return Command(name, params=parameters, callback=callback, help=help, **extra)
