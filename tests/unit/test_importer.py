"""The guest's module archive: written by images/bytecode.py, read by images/importer.py."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import images.importer
from images import bytecode
from images.bytecode import Source, archive, compiled
from images.importer import TEXTS, Archive, LazyModule, Texts

SOURCES = {
    "hp_pack": "",
    "hp_pack.plain": '"""Doc."""\nimport hp_lazy\ndef f():\n    """Doc."""\nclass C:\n    """Doc."""\n    x = 1\n',
    "hp_pack.data": "from dataclasses import dataclass\n@dataclass\nclass D:\n    x: int = 3\n",
    "hp_lazy": "import sys\nsys.hp_runs = getattr(sys, 'hp_runs', 0) + 1\nanswer = 42\n",
    "hp_broken": "raise ValueError('once more')\n",
}
LAZY = {"hp_lazy", "hp_broken"}


@pytest.fixture
def finder(tmp_path: Path) -> Iterator[Archive]:
    """An archive of SOURCES that imports look into."""
    sources: list[Source] = []
    for name, text in SOURCES.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        sources.append(
            {"name": name, "path": str(path), "shown": f"/guest/{name}.py", "package": name == "hp_pack",
             "lazy": name in LAZY}
        )  # fmt: skip
    (tmp_path / "modules").write_bytes(archive(sources, [("eval", "6 * 7")]))
    found = Archive(str(tmp_path / "modules"))
    sys.meta_path.insert(0, found)
    sys.__dict__.pop("hp_runs", None)
    yield found
    sys.meta_path.remove(found)
    for name in SOURCES:
        sys.modules.pop(name, None)


def load(name: str) -> types.ModuleType:
    __import__(name)
    return sys.modules[name]


def test_a_lazy_module_runs_once_when_it_is_used(finder: Archive) -> None:
    plain = load("hp_pack.plain")
    lazy = plain.hp_lazy
    assert type(lazy) is LazyModule and not hasattr(sys, "hp_runs")
    assert lazy.__name__ == "hp_lazy" and lazy.__spec__  # looked at by the import system
    assert load("hp_lazy") is lazy and not hasattr(sys, "hp_runs")
    assert lazy.answer == 42 and type(lazy) is types.ModuleType
    assert lazy.answer == 42 and vars(sys)["hp_runs"] == 1
    with pytest.raises(AttributeError):
        lazy.missing  # noqa: B018


def test_writer_and_reader_agree() -> None:
    assert bytecode.TEXTS == TEXTS


def test_from_import_uses_it(finder: Archive) -> None:
    from hp_lazy import answer  # type: ignore[import-not-found]

    assert answer == 42


def test_a_lazy_module_that_fails_says_so_each_time(finder: Archive) -> None:
    broken = load("hp_broken")
    for _ in range(2):
        with pytest.raises(ValueError, match="once more"):
            broken.anything  # noqa: B018


def test_known_texts_are_not_compiled_again(finder: Archive) -> None:
    texts = Texts()
    texts.known, texts.unknown = finder.texts(), []
    assert eval(texts.compiled("6 * 7", "eval")) == 42 and texts.unknown == []  # type: ignore[arg-type]
    space: dict[str, object] = {}
    exec(texts.compiled("x = 1", "exec"), space)  # type: ignore[arg-type]
    assert space["x"] == 1 and texts.unknown == [("exec", "x = 1")]


def test_modules_that_make_code_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "def f(t):\n    exec(t, globals())\n    return eval('y' + t[-1:], {'y1': 5})\n"
        "def g(t):\n    return eval(compile(t, '<string>', 'eval'))\n"
        "def h(cls):\n    return cls.__name__ + str(inspect.signature(cls)).replace(' -> None', '')\n"
    )
    source: Source = {
        "name": "dataclasses", "path": str(path), "shown": "m", "package": False, "lazy": False
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "importer", images.importer)
    monkeypatch.setattr(images.importer.texts, "unknown", [])
    space: dict[str, Any] = {}
    exec(compiled(source), space)
    assert space["f"]("z = 1") == 5 and space["z"] == 1
    assert images.importer.texts.unknown == [("exec", "z = 1"), ("eval", "y1")]
    assert space["g"]("6 * 7") == 42
    assert ("eval", "6 * 7") in images.importer.texts.unknown
    assert space["h"](int) == "int"  # nothing is computed, and inspect not needed


def test_what_is_not_there_is_left_to_others(finder: Archive) -> None:
    assert finder.find_spec("hp_other") is None
    with pytest.raises(ModuleNotFoundError):
        load("hp_pack.other")


def test_documentation_is_gone(finder: Archive) -> None:
    plain, data = load("hp_pack.plain"), load("hp_pack.data")
    assert plain.__doc__ is None and plain.f.__doc__ is None and plain.C.__doc__ is None and plain.C.x == 1
    assert plain.f() is None and plain.f.__code__.co_filename == "/guest/hp_pack.plain.py"
    assert data.D().x == 3


def test_statements_that_are_no_documentation_stay(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("from __future__ import annotations\ndef f():\n    x = 1\n    'late'\n    return x\n")
    space: dict[str, object] = {}
    exec(compiled({"name": "m", "path": str(path), "shown": "m", "package": False, "lazy": False}), space)
    assert space["f"]() == 1  # type: ignore[operator]
