"""Damaged and hostile layers: the planner answers with a plan or one of two errors, within its bounds."""

from __future__ import annotations

import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpod.errors import ImageError, ResourceExhausted
from hyperpod.spec.layers import MAX_PATH, LayerTree
from hyperpod.spec.layertar import Copy, emit
from hyperpod.spec.tarindex import TarParser
from tests.imagekit import Item, folder, hardlink, symlink, tar

ENTRIES = 200
SEED = tar(
    folder("d", uid=3_000_000),
    Item("d/file", b"contents" * 100, mtime=99),
    Item("n" * 150, b"x", pax={"SCHILY.xattr.user.a": "b"}),
    symlink("s", "d"),
    hardlink("h", "d/file"),
    Item("s/below", b"y"),
    Item("d/.wh.gone"),
    Item("null", kind=tarfile.CHRTYPE, device=(1, 3)),
)
GNU = tar(Item("g" * 150, b"x", uid=1 << 40), symlink("l", "t" * 150), format=tarfile.GNU_FORMAT)
names = st.one_of(
    st.lists(st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh."]), max_size=5).map(
        "/".join
    ),
    st.text(st.characters(codec="utf-8", min_codepoint=1), max_size=20),
)
kinds = st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"\0", b"S", b"V"])
entries = st.builds(
    Item,
    names,
    st.binary(max_size=40),
    kinds,
    names,
    mode=st.integers(0, 0o7777),
    uid=st.integers(-5, 1 << 33),
    mtime=st.integers(-(1 << 35), 1 << 35),
    device=st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20)),
)


def check(raw: bytes, step: int) -> None:
    """Feed it in pieces; whatever comes out is well formed."""
    parser = TarParser(max_entries=ENTRIES, max_metadata=1 << 20)
    tree = LayerTree(max_nodes=2 * ENTRIES)
    try:
        for at in range(0, len(raw), step):
            for entry in parser.feed(raw[at : at + step]):
                assert entry.size >= 0 and entry.offset <= len(raw) + 512
                tree.add(entry)
        parser.finish()
        plan = tree.plan()
    except (ImageError, ResourceExhausted) as exc:
        assert len(str(exc)) < 2000 and str(exc).isprintable()
        return
    seen = {b""}
    last = 0
    for path, _ in (*plan.folders, *plan.specials, *plan.files, *((p, n) for p, _, n in plan.links)):
        assert path not in seen and path.rpartition(b"/")[0] in seen
        assert len(path) <= MAX_PATH and not path.startswith(b"/")
        assert not {b"", b".", b".."} & set(path.split(b"/"))
        seen.add(path)
    assert all(target in seen for _, target, _ in plan.links)
    for piece in emit(plan):
        if isinstance(piece, Copy):
            assert last <= piece.offset and piece.offset + piece.size <= len(raw)
            last = piece.offset + piece.size
        else:
            assert len(piece) % 512 == 0 or len(piece) < 512


@settings(max_examples=600)
@given(st.lists(entries, max_size=12), st.sampled_from([1, 511, 512, 513, 1 << 20]))
def test_hostile_entries(items: list[Item], step: int) -> None:
    try:
        raw = tar(*items)
    except (ValueError, UnicodeError):
        return  # Python's writer refuses some numbers
    check(raw, step)


@settings(max_examples=1500)
@given(
    st.sampled_from([SEED, GNU]),
    st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=4),
    st.integers(0, 1 << 14),
    st.booleans(),
)
def test_damaged_tars(seed: bytes, changes: list[tuple[int, int]], cut: int, mend: bool) -> None:
    """Bytes changed anywhere, with header checksums mended half of the time so that the change is looked at."""
    raw = bytearray(seed[: len(seed) - cut % 2048])
    for at, value in changes:
        raw[at % len(raw)] = value
        block = at % len(raw) // 512 * 512
        if mend and block + 512 <= len(raw):
            raw[block + 148 : block + 156] = b" " * 8
            raw[block + 148 : block + 156] = b"%06o\0 " % sum(raw[block : block + 512])
    check(bytes(raw), 1 << 20)


@settings(max_examples=300)
@given(st.binary(max_size=3000))
def test_any_bytes(raw: bytes) -> None:
    check(raw, 700)
