"""Which Python modules a program needs, by reading its imports; nothing is executed.

Imports inside functions count (they run later), those under `if TYPE_CHECKING` do not.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

EXTENSION_TAGS = (".cpython-", ".abi3.so", ".so")


@dataclasses.dataclass
class Closure:
    """What `follow` found.

    files: module name -> its file (.py, or a shared object); unknown: names whose package is in no root.
    """

    files: dict[str, Path]
    unknown: set[str]


def follow(start: Iterable[str], roots: list[Path], without: frozenset[str], *, extensions: bool) -> Closure:
    """Every module below `roots` that the modules in `start` import, directly or not.

    `without` names modules (and with them their submodules) that are left out although something imports them.
    `extensions` says whether shared objects count as modules; where not, their pure Python stand-in is used.
    """
    closure = Closure({}, set())
    todo = list(start)
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if _left_out(name, without):
            continue
        if "." in name:
            todo.append(name.rpartition(".")[0])
        path = find(name, roots, extensions=extensions)
        if path is None:
            if find(name.partition(".")[0], roots, extensions=extensions) is None:
                closure.unknown.add(name)  # otherwise it is an attribute of a package that is here
            continue
        closure.files[name] = path
        if path.suffix == ".py":
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            todo.extend(imports(path.read_text(encoding="utf-8"), package))
    return closure


def _left_out(name: str, without: frozenset[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in without for n in range(1, len(parts) + 1))


def find(name: str, roots: list[Path], *, extensions: bool) -> Path | None:
    """The file of a module, searched as the interpreter does, or None."""
    relative = Path(*name.split("."))
    for root in roots:
        folder = root / relative
        if (folder / "__init__.py").is_file():
            return folder / "__init__.py"
        if extensions and folder.parent.is_dir():
            for candidate in sorted(folder.parent.glob(f"{folder.name}.*so")):
                if any(candidate.name[len(folder.name) :].startswith(tag) for tag in EXTENSION_TAGS):
                    return candidate
        if folder.with_name(f"{folder.name}.py").is_file():
            return folder.with_name(f"{folder.name}.py")
    return None


def imports(source: str, package: str) -> Iterator[str]:
    """Names of the modules that a source imports; `from a import b` gives a and a.b, as b may be a module.

    `package` is the package that relative imports start from.
    """
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value[:1] != ".":
                yield first.value
        todo.extend(ast.iter_child_nodes(node))


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = ".".join(parts[: len(parts) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base
