"""Tell libFuzzer which branches Python code takes: each block of a module notes that it ran, in a byte of its own.

The blocks are told apart in the syntax tree when a module is imported; ``__branches__[17] = 1`` at the start of each
is all that is added, and costs some tens of nanoseconds.
"""

from __future__ import annotations

import ast
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

NAME = "__branches__"


class Marker(ast.NodeTransformer):
    """Puts a mark at the start of each function, branch and loop body.

    Args:
        first: Number of the first mark.
        count: How many there are; numbers wrap.
    """

    def __init__(self, first: int, count: int) -> None:
        self._count = count
        self.next = first

    def _mark(self) -> ast.stmt:
        number = self.next % self._count
        self.next += 1
        return ast.parse(f"{NAME}[{number}] = 1").body[0]

    def _visit_blocks(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, self._mark())
        if isinstance(node, ast.If | ast.For | ast.While | ast.Try):  # also when it is not taken
            node.orelse.insert(0, self._mark())
        return node  # type: ignore[no-any-return]

    visit_If = visit_For = visit_While = visit_ExceptHandler = visit_match_case = _visit_blocks  # noqa: N815

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Mark it behind its docstring."""
        self.generic_visit(node)
        node.body.insert(1 if ast.get_docstring(node, clean=False) is not None else 0, self._mark())
        return node


class MarkingLoader(SourceFileLoader):
    """Compiles from the marked tree, never from a cache."""

    def __init__(self, name: str, path: str, finder: MarkingFinder) -> None:
        super().__init__(name, path)
        self._finder = finder

    def get_code(self, fullname: str) -> CodeType:
        """Compile the marked source."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        marker = Marker(self._finder.next, len(self._finder.branches))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                marker.visit(node)
        self._finder.next = marker.next
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        """Run it, with the marks in reach."""
        setattr(module, NAME, self._finder.branches)
        super().exec_module(module)


class MarkingFinder:
    """Has the modules of some packages marked, from its installation on.

    Args:
        prefixes: Names, or beginnings of names.
        branches: Where the marks go: a byte each.
    """

    def __init__(self, prefixes: tuple[str, ...], branches: Any) -> None:
        self._prefixes = prefixes
        self.branches = branches
        self.next = 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if not name.startswith(self._prefixes):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = MarkingLoader(name, spec.loader.path, self)
        return spec

    def install(self) -> None:
        """Be asked before others."""
        sys.meta_path.insert(0, self)
