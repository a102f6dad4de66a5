"""The click side of the command line: groups, help, completion, and every mistake click can name."""

from __future__ import annotations

import importlib
import os
import sys

import click

import kvmlite
from kvmlite.cli.main import EXIT_BROKEN_PIPE, EXIT_FAILED, report_error
from kvmlite.cli.options import as_click
from kvmlite.errors import HostError, KvmliteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# name -> (module, attribute, one line for --help); imported only when used
COMMANDS = {
    "run": ("kvmlite.cli.commands", "", "Run a command in a microVM, or boot a guest as it is."),
    "kernel": ("kvmlite.cli.kernel", "kernel", "Kernels to boot: add, list, show, remove."),
    "image": ("kvmlite.cli.image", "image", "Root file systems to run: import, list, show, remove."),
    "volume": ("kvmlite.cli.volume", "volume", "Disks that last: create, resize, convert, list, show, remove."),
    "network": ("kvmlite.cli.network_command", "network", "What guests' networks changed on this host: list, sweep."),
    "doctor": ("kvmlite.cli.doctor", "doctor", "Say whether microVMs can run here, and what would make them faster."),
}


class LazyGroup(click.Group):
    """Imports a subcommand when it is asked for, and suggests the nearest one for a typing mistake."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "run":
            return _run_command()
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            suggestion = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command: {args[0]}; {suggestion}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(kvmlite.__version__, prog_name="kvmlite")
def cli() -> None:
    """MicroVMs on KVM: run a command in a stock Linux kernel, or boot any small guest."""


def _run_command() -> click.Command:
    from kvmlite.cli import run

    command: click.Command = as_click(
        "run",
        run.OPTIONS,
        run.run,
        run.HELP,
        epilog=run.EPILOG,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return command


def run_click(arguments: Sequence[str]) -> int:
    """Run through click; the exit code. Usage errors are one line and 125."""
    try:
        result = cli.main(args=list(arguments), prog_name="kvmlite", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        asked = " ".join(("kvmlite", *(word for word in arguments[:1] if word in COMMANDS)))
        where = context.command_path if context is not None else asked  # click's parser of options does not tell
        report_error(error.format_message().rstrip("."), f"see {where} --help")
        return EXIT_FAILED
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except SystemExit as error:  # click turns a broken pipe into status 1
        has_broken_pipe = type(sys.stdout).__name__.endswith("PacifyFlushWrapper")
        return EXIT_BROKEN_PIPE if has_broken_pipe else int(error.code or 0)
    except OSError as error:
        if isinstance(error, KvmliteError) or error.filename is not None:
            raise
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)  # what could not be written is still buffered: Python would try again at its end
        os.close(null)
        raise HostError(f"cannot write the output: {error.strerror}", error.errno or 0) from error
    return result if isinstance(result, int) else 0
