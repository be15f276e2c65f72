"""The committed gRPC code is what the .proto files give."""

from __future__ import annotations

import shutil
from pathlib import Path

from hyperpod.api import generate


def test_committed_code_is_current() -> None:
    assert generate.drift() == []


def test_a_changed_file_and_a_stray_one_are_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "gen"
    shutil.copytree(generate.GENERATED, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "runtime/v1/__init__.py").open("a") as file:
        file.write("# touched\n")
    (copy / "stray.py").write_text("")
    assert generate.drift(copy) == ["runtime/v1/__init__.py", "stray.py"]
    generate.write(copy)
    assert generate.drift(copy) == []
