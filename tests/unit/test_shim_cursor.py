"""The cursor file: what was saved last is loaded, and a slot that was torn does not count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.shim.cursor import Cursor, CursorFile

numbers = st.integers(0, 2**64 - 1)
cursors = st.builds(Cursor, numbers, numbers, numbers, numbers, numbers, numbers, st.integers(0, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cursors")


def load(path: Path) -> Cursor | None:
    file = CursorFile(str(path))
    try:
        return file.load()
    finally:
        file.close()


def save(path: Path, *cursors: Cursor) -> None:
    file = CursorFile(str(path))
    file.load()
    for cursor in cursors:
        file.save(cursor)
    file.close()


@given(first=st.lists(cursors, min_size=1, max_size=4), then=st.lists(cursors, max_size=3))
def test_the_last_one_saved_is_loaded(folder: Path, first: list[Cursor], then: list[Cursor]) -> None:
    path = folder / "cursor"
    path.unlink(missing_ok=True)
    assert load(path) is None
    save(path, *first)
    save(path, *then)
    assert load(path) == [*first, *then][-1]


@given(where=st.integers(0, 10**6), flip=st.integers(1, 255), count=st.integers(2, 5))
def test_a_damaged_slot_leaves_the_other(folder: Path, where: int, flip: int, count: int) -> None:
    path = folder / "damaged"
    path.unlink(missing_ok=True)
    saved = [Cursor(1, 2, number, number, 0, 0) for number in range(count)]
    save(path, *saved)
    raw = bytearray(path.read_bytes())
    raw[where % len(raw)] ^= flip
    path.write_bytes(raw)
    assert load(path) in saved[-2:]


def test_a_write_cut_anywhere_leaves_the_cursor_before(folder: Path) -> None:
    path = folder / "cut"
    save(path, Cursor(1, 2, 3, 4, 5, 6))
    before = path.read_bytes()
    save(path, Cursor(7, 8, 9, 10, 11, 12, 3))
    after = path.read_bytes().ljust(len(before), b"\0")
    before = before.ljust(len(after), b"\0")
    for size in range(len(after)):
        path.write_bytes(after[:size] + before[size:])
        assert load(path) in (Cursor(1, 2, 3, 4, 5, 6), Cursor(7, 8, 9, 10, 11, 12, 3))
    path.write_bytes(b"\xff" * 2000)
    assert load(path) is None


def test_streams_by_name() -> None:
    cursor = Cursor()
    cursor.set_offset("stdout", 5)
    cursor.set_offset("stderr", 7)
    cursor.set_ended("stderr")
    assert (cursor.offset("stdout"), cursor.offset("stderr")) == (5, 7)
    assert (cursor.has_ended("stdout"), cursor.has_ended("stderr")) == (False, True)
    cursor.set_ended("stdout")
    assert cursor == replace(Cursor(), stdout=5, stderr=7, ended=3)
