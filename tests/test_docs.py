"""The documentation is true where a program can tell: links, options, exit codes, numbers."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import click
import pytest
from support.requirements import ROOT

import kvmlite
from kvmlite.abi import layout
from kvmlite.cli import main as cli_main
from kvmlite.cli.commands import cli
from kvmlite.cli.run import EPILOG, OPTIONS, exit_code
from kvmlite.cli.run_command import EXIT_BOOT
from kvmlite.machine import outcome as outcomes

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# docker's, the agent's when a test runs it, and two that stand for any.
FOREIGN = {"--device", "--fd", "--option", "--flag", "--vhost-user", "--print-capabilities"}
SCRIPTS = ("lab", "test", "setup", "quickstart", "bench")
OUTCOMES = (
    outcomes.PoweredOff(),
    outcomes.Reset(),
    outcomes.Panicked(),
    outcomes.TripleFault(vcpu_id=0),
    outcomes.TimedOut(limit_s=1.0),
    outcomes.Hung(detail=""),
    outcomes.Lost(detail=""),
    outcomes.VmmError(error=ValueError()),
    outcomes.Stopped(),
)
EXEC_CODES = {126, 127}  # ExecFailed.exit_code: tests/unit/guest

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def options_of(command: click.Command) -> set[str]:
    """Long options of a click command and of those below it."""
    found = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
    context = click.Context(command)
    found |= {flag for flag in command.get_help_option_names(context) if flag.startswith("--")}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= options_of(below)
    return found


def options_of_scripts() -> set[str]:
    """Everything in our scripts that reads like a long option."""
    files = [ROOT / "scripts" / name for name in SCRIPTS] + [*(ROOT / "scripts").glob("*/*.py")]
    return {flag for path in files if path.is_file() for flag in OPTION.findall(path.read_text())}


def exit_codes_of_run() -> set[int]:
    """Every exit code of ``kvmlite run`` that is not the command's own."""
    codes = {exit_code(outcome, bare=False) for outcome in OUTCOMES} | {EXIT_BOOT} | EXEC_CODES
    return codes | {cli_main.EXIT_TIMEOUT, cli_main.EXIT_FAILED, cli_main.EXIT_INTERRUPTED}


def codes_in(text: str) -> set[int]:
    """Numbers from 101 to 199 in a text."""
    return {int(number) for number in re.findall(r"\b1\d\d\b", text)} - {100, 128}


@each_page
def test_relative_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    relative = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in relative if not (page.parent / target).exists()] == []


@each_page
def test_options_that_are_mentioned_exist(page: Path) -> None:
    mentioned = set(OPTION.findall(page.read_text()))
    assert sorted(mentioned - options_of(cli) - options_of_scripts() - FOREIGN) == []


@each_page
def test_options_behind_kvmlite_run_are_its_own(page: Path) -> None:
    known = {flag for option in OPTIONS for flag in option.flags} | {"--help", "--"}
    wrong = []
    for line in re.findall(r"kvmlite run ([^\n`]*)", page.read_text()):
        before_command = line.split(" -- ")[0].split("#")[0]
        wrong += [flag for flag in re.findall(r"(?<!\S)-[-a-z]+", before_command) if flag not in known]
    assert wrong == []


@each_page
def test_files_of_the_project_that_are_mentioned_exist(page: Path) -> None:
    named = re.findall(r"`(?:\./)?((?:docs|examples|scripts|tests|src)/[\w./-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists() and "foo" not in name] == []


@each_page
def test_no_page_names_a_path_of_some_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w/])/(?:work|root|home/\w+)/[\w./-]*", page.read_text()) == []


def test_every_option_of_run_is_in_the_manual() -> None:
    rows = "\n".join(line for line in (ROOT / "docs/running.md").read_text().splitlines() if line.startswith("| `-"))
    missing = [flag for option in OPTIONS for flag in option.flags if f"`{flag}`" not in rows]
    assert missing == []


def test_exit_codes_are_the_same_in_help_readme_and_program() -> None:
    section = (ROOT / "README.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    first_cells = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    assert codes_in(first_cells) == exit_codes_of_run()
    assert codes_in(EPILOG) == exit_codes_of_run()


def test_the_python_in_the_readme_compiles_and_uses_public_names() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        tree = ast.parse(block)
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kvmlite"
        }
        used |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "kvmlite"
            for alias in node.names
        }
        assert used
        assert used <= set(kvmlite.__all__)


def test_the_manual_names_every_outcome() -> None:
    text = (ROOT / "docs/running.md").read_text()
    names = [kind.__name__ for kind in outcomes.Outcome.__args__]
    assert [name for name in names if f"`{name}" not in text] == []


def test_the_map_in_the_architecture_page_is_the_programs() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for address in (
        layout.BOOT_GDT, layout.BOOT_IDT, layout.PVH_START_INFO, layout.ZERO_PAGE, layout.BOOT_STACK, layout.PAGE_TABLES,
        layout.SETUP_DATA, layout.CMDLINE, layout.EBDA, layout.ACPI_TABLES, layout.RESET_VECTOR, layout.KERNEL,
        layout.HOLE_START, layout.VIRTIO_MMIO, layout.IOAPIC, layout.LAPIC, layout.IDENTITY_MAP, layout.TSS,
        layout.COM1_PORT, layout.COM2_PORT, layout.DEBUG_EXIT_PORT, layout.ACPI_SLEEP_CONTROL_PORT, layout.ACPI_RESET_PORT,
    ):  # fmt: skip
        assert re.search(rf"\b{address:#x}\b", text), f"{address:#x}"
    assert f"(n < {layout.VIRTIO_MMIO_MAX_DEVICES})" in text


def test_each_decision_is_one_page_with_context_decision_and_price() -> None:
    pages = sorted((ROOT / "docs/adr").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        headings = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert headings == ["Context", "Decision", "Price"], page.name
        assert len(page.read_text().splitlines()) <= 60, page.name


@pytest.mark.git
def test_every_tracked_text_is_free_of_machine_paths() -> None:
    """Pages are looked at above; this is code, scripts and configuration."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-nE", "[^a-z]/wor[k]/"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 128, done.stderr
    assert done.stdout == ""
