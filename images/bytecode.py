"""Compiles modules for the guest: run by its own Python, whose byte code it is, with a Job as JSON on stdin.

Documentation is left out: reading it costs boot time. A decorated class gets its name as its documentation,
since `dataclass` would otherwise compute a signature for it, for which it needs all of `inspect`.
"""

from __future__ import annotations

import ast
import json
import marshal
import sys
from importlib.util import MAGIC_NUMBER
from typing import Any, TypedDict

PYC_HEADER = MAGIC_NUMBER + b"\1\0\0\0" + bytes(8)
"""Hash-based and unchecked (PEP 552): no times in it, no look at a source at start."""


class Source(TypedDict):
    """`path` is the source, `shown` the file name in tracebacks."""

    name: str
    path: str
    shown: str
    package: bool
    lazy: bool


class Job(TypedDict):
    """`modules` go into `archive` (its format: images/importer.py), `files` become .pyc files of their own."""

    archive: str
    modules: list[Source]
    files: list[tuple[Source, str]]


class _Brief(ast.NodeTransformer):
    def visit_Module(self, node: ast.Module) -> ast.AST:  # ast's names
        return self._without(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._without(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._without(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._without(node)
        if node.decorator_list:
            node.body.insert(0, ast.Expr(ast.Constant(node.name)))
        return node

    def _without(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if len(node.body) > 1 or isinstance(node, ast.Module) else [ast.Pass()]
        return node  # type: ignore[no-any-return]


def compiled(source: Source) -> Any:
    """The code object of a module, without documentation."""
    with open(source["path"], "rb") as file:
        tree = _Brief().visit(ast.parse(file.read(), source["shown"]))
    return compile(ast.fix_missing_locations(tree), source["shown"], "exec", dont_inherit=True, optimize=0)


def archive(sources: list[Source]) -> bytes:
    """What importer.Archive reads."""
    index: dict[str, tuple[int, int, bool, bool]] = {}
    parts: list[bytes] = []
    offset = 0
    for source in sources:
        code = marshal.dumps(compiled(source))
        index[source["name"]] = (offset, len(code), source["package"], source["lazy"])
        parts.append(code)
        offset += len(code)
    head = marshal.dumps(index)
    return b"".join([len(head).to_bytes(4, "little"), head, *parts])


def main() -> None:
    job: Job = json.load(sys.stdin)
    with open(job["archive"], "wb") as file:
        file.write(archive(job["modules"]))
    for source, result in job["files"]:
        with open(result, "wb") as file:
            file.write(PYC_HEADER + marshal.dumps(compiled(source)))


if __name__ == "__main__":
    main()
