"""The configuration refuses what it does not know, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperpod.config import Config, load
from hyperpod.errors import InvalidArgument


def write(path: Path, text: str) -> Path:
    file = path / "c.toml"
    file.write_text(text)
    return file


def test_sources_in_order(tmp_path: Path) -> None:
    file = write(tmp_path, 'run_dir = "/run/a"\nlog_level = "debug"\n[vm]\nscratch_mib = 128\n')
    got = load(file, {"run_dir": Path("/run/b"), "listen": None})
    assert (got.run_dir, got.log_level, got.vm.scratch_mib) == (Path("/run/b"), "debug", 128)
    assert got.socket_path == Path("/run/b/cri.sock")
    assert load(None, {}) == Config()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[vm]\nmemori = 1\n", "vm.memori"),
        ('listen = "tcp://1.2.3.4"\n', "listen"),
        (f'run_dir = "/{"x" * 80}"\n', "run_dir"),
        ('state_dir = "/a,b"\n', "state_dir '/a,b' has a ','"),
        ("sandbox_slots = 0\n", "sandbox_slots"),
        ("not toml", "c.toml"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        load(write(tmp_path, text), {})


def test_folders_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(None, {"state_dir": Path("state")}).state_dir == tmp_path / "state"
    monkeypatch.chdir("/run")
    assert load(None, {"run_dir": Path("a")}).run_dir == Path("/run/a")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        load(tmp_path / "none.toml", {})
