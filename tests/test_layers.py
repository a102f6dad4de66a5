"""Where things may be: imports point down, /dev/kvm is opened in one place, and only the command line prints."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.requirements import ROOT

PACKAGE = ROOT / "src/kvmlite"


@functools.cache
def parsed(name: str) -> ast.Module:
    """The syntax tree of a module by its path below src/kvmlite."""
    return ast.parse((PACKAGE / name).read_text(), filename=name)


def sources() -> Iterator[tuple[str, ast.Module]]:
    """``(path below src/kvmlite, syntax tree)`` of every module but the native build."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name != "_native/build.py":
            yield name, parsed(name)


def string_constants(tree: ast.Module) -> Iterator[str]:
    """Strings the module uses; docstrings and other bare strings are text, not use."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def names_called(tree: ast.Module) -> Iterator[str]:
    """``f`` and ``a.f`` for each call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_imports_only_point_down() -> None:
    """The contract is in pyproject.toml; import-linter says which import breaks it."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[result.stdout.find("Broken contracts") :] + result.stderr


def test_only_the_kvm_layer_opens_dev_kvm() -> None:
    used = {name for name, tree in sources() if "/dev/kvm" in string_constants(tree) and not name.startswith("kvm/")}
    # To look at its permissions is not to open it.
    assert used <= {name for name in used if name.startswith(("host/facts", "host/checks", "cli/"))}


def test_only_the_command_line_prints() -> None:
    printing = {name for name, tree in sources() if "print" in names_called(tree)}
    assert {name for name in printing if not name.startswith("cli/")} == set()


def test_only_the_command_line_exits() -> None:
    exits = {"sys.exit", "exit", "quit", "os._exit"}
    found = {name for name, tree in sources() if exits & set(names_called(tree)) and not name.startswith("cli/")}
    assert found == set()


def test_nothing_registers_signal_handlers_but_the_command_line() -> None:
    """kvmlite is a library: signals belong to the program around it."""
    found = {name for name, tree in sources() if "signal.signal" in names_called(tree) and not name.startswith("cli/")}
    assert found == set()


def test_no_exception_is_swallowed_whole() -> None:
    """``except Exception: pass`` hides a bug of ours; ``except:`` hides even Ctrl-C."""
    found = []
    for name, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kind = ast.unparse(node.type) if node.type else ""
            if kind in ("", "Exception", "BaseException") and all(isinstance(step, ast.Pass) for step in node.body):
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_ioctls_go_through_the_kvm_layer() -> None:
    """Requests on KVM's descriptors are issued, and their errors named, in kvm/ioctl.py alone."""
    callers = {name for name, tree in sources() if {"lib.kvl_ioctl_value", "lib.kvl_ioctl_pointer"} & set(_names(tree))}
    assert callers == {"kvm/ioctl.py"}


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("name", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_every_module_says_what_it_is_for(name: str) -> None:
    tree = parsed(name)
    assert not tree.body or ast.get_docstring(tree), f"{name} has no docstring"
