"""Two readers of one grammar: what the plain one accepts, click reads the same."""

from __future__ import annotations

from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlite.cli.options import FLAG, MANY, Option, as_click, read_plain
from kvmlite.cli.run import EPILOG, HELP, OPTIONS

Values = dict[str, Any]
SMALL = (
    Option("--name", "-n", metavar="NAME", default="none"),
    Option("--is-loud", kind=FLAG),
    Option("--with", "-w", kind=MANY, metavar="TEXT"),
)
WORDS = [
    "--name",
    "--name=",
    "--name=x=y",
    "-n",
    "-nx",
    "-w",
    "--with",
    "--is-loud",
    "--is-loud=1",
    "-x",
    "--",
    "-",
    "",
    "a",
    "b c",
]


def read_click(options: tuple[Option, ...], arguments: list[str]) -> Values | None:
    """What click makes of them; None if it refuses."""
    seen: list[Values] = []

    def take(values: Values) -> int:
        seen.append(values)
        return 0

    command = as_click("small", options, take, "")
    try:
        command.main(args=arguments, prog_name="small", standalone_mode=False)
    except SystemExit:
        return seen[0]
    except click.UsageError:
        return None
    raise AssertionError("the command did not run")


def test_plain_options_are_read() -> None:
    values = read_plain(SMALL, ["--name", "x", "--with=1", "--is-loud", "-w", "2", "--", "ls", "--name"])
    assert values == {"name": "x", "is_loud": True, "with": ["1", "2"], "image": "", "command": ["ls", "--name"]}


def test_options_that_are_not_given_have_their_defaults() -> None:
    assert read_plain(SMALL, []) == {"name": "none", "is_loud": False, "with": [], "image": "", "command": []}


@pytest.mark.parametrize(
    "arguments", [["--nam", "x"], ["--name"], ["--name", "--is-loud"], ["--is-loud=1"], ["a", "b"], ["-nx"], ["--help"]]
)
def test_anything_else_is_left_to_click(arguments: list[str]) -> None:
    assert read_plain(SMALL, arguments) is None


@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_what_is_read_plainly_click_reads_the_same(arguments: list[str]) -> None:
    plain = read_plain(SMALL, arguments)
    if plain is not None:
        assert read_click(SMALL, arguments) == plain


def test_the_options_of_run_are_unique() -> None:
    flags = [flag for option in OPTIONS for flag in option.flags]
    assert len(flags) == len(set(flags))


def test_the_help_of_run_names_every_option_and_exit_code() -> None:
    command = as_click("run", OPTIONS, lambda values: 0, HELP, epilog=EPILOG)
    text = command.get_help(click.Context(command, info_name="kvmlite run"))
    assert [flag for option in OPTIONS for flag in option.flags if flag not in text] == []
    assert "125 kvmlite" in " ".join(text.split())


@pytest.mark.parametrize("arguments", [["a", "--name", "x"], ["--name", "x", "a"], ["--is-loud", "a", "--", "a"]])
def test_the_image_is_the_one_word_before_the_command(arguments: list[str]) -> None:
    values = read_plain(SMALL, arguments)
    assert values is not None
    assert values["image"] == "a"
    assert read_click(SMALL, arguments) == values


def test_two_words_before_the_command_are_refused_with_what_was_meant() -> None:
    assert read_plain(SMALL, ["a", "b", "c"]) is None
    command = as_click("small", SMALL, lambda values: 0, "")
    with pytest.raises(click.UsageError, match="a command goes behind --: kvmlite small a -- b c"):
        command.main(args=["a", "b", "c"], prog_name="small", standalone_mode=False)
