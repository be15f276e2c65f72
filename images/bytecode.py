"""Compiles modules for the guest: run by its own Python, whose byte code it is, with a Job as JSON on stdin.

Documentation is left out: reading it costs boot time; so does the signature that `dataclass` writes for a class
without documentation, for which it needs all of `inspect`. Modules that make code of text ask importer.texts.
"""

from __future__ import annotations

import ast
import json
import marshal
import sys
from importlib.util import MAGIC_NUMBER
from typing import Any, TypedDict

TEXTS = "<texts>"
"""The name of the texts' entry: importer.TEXTS, which a build cannot import."""

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
    """`modules` and `texts` (mode and text) go into `archive` (its format: images/importer.py), `files` become .pyc
    files of their own."""

    archive: str
    modules: list[Source]
    texts: list[tuple[str, str]]
    files: list[tuple[Source, str]]


MAKE_CODE = frozenset({"collections", "dataclasses", "typing"})
"""Modules whose code of text comes from importer.texts: what they exec or eval, or compile to eval it."""


class _Precompiled(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:  # ast's name
        self.generic_visit(node)
        match node:
            case ast.Call(ast.Name("exec" | "eval" as mode), [text, *_]):
                node.args[0] = self._look_up(text, mode)
            case ast.Call(ast.Name("compile"), [text, ast.Constant(), ast.Constant("eval")], []):
                return self._look_up(text, "eval")
            case ast.Call(ast.Attribute(ast.Name("inspect"), "signature")):
                return ast.Constant("")
        return node

    def _look_up(self, text: ast.expr, mode: str) -> ast.expr:
        call = ast.parse("__import__('importer').texts.compiled(0, 0)", mode="eval").body
        assert isinstance(call, ast.Call)
        call.args = [text, ast.Constant(mode)]
        return call


class _Brief(ast.NodeTransformer):
    def visit_Module(self, node: ast.Module) -> ast.AST:  # ast's names
        return self._without(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._without(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._without(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._without(node)

    def _without(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if len(node.body) > 1 or isinstance(node, ast.Module) else [ast.Pass()]
        return node  # type: ignore[no-any-return]


def compiled(source: Source) -> Any:
    """The code object of a module, without documentation."""
    with open(source["path"], "rb") as file:
        tree = _Brief().visit(ast.parse(file.read(), source["shown"]))
    if source["name"] in MAKE_CODE:
        tree = _Precompiled().visit(tree)
    return compile(ast.fix_missing_locations(tree), source["shown"], "exec", dont_inherit=True, optimize=0)


def archive(sources: list[Source], texts: list[tuple[str, str]]) -> bytes:
    """What importer.Archive reads."""
    index: dict[str, tuple[int, int, bool, bool]] = {}
    parts: list[bytes] = []
    offset = 0
    codes = {(mode, text): compile(text, "<string>", mode, 0, True) for mode, text in texts}
    contents = [(source["name"], compiled(source), source["package"], source["lazy"]) for source in sources]
    for name, content, package, lazy in [*contents, (TEXTS, codes, False, False)]:
        code = marshal.dumps(content)
        index[name] = (offset, len(code), package, lazy)
        parts.append(code)
        offset += len(code)
    head = marshal.dumps(index)
    return b"".join([len(head).to_bytes(4, "little"), head, *parts])


def main() -> None:
    job: Job = json.load(sys.stdin)
    with open(job["archive"], "wb") as file:
        file.write(archive(job["modules"], job["texts"]))
    for source, result in job["files"]:
        with open(result, "wb") as file:
            file.write(PYC_HEADER + marshal.dumps(compiled(source)))


if __name__ == "__main__":
    main()
