"""Records survive a crash at any byte, damaged ones are set aside, ids resolve by unique prefix."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperpod.errors import InvalidArgument, NotFound, ResourceExhausted
from hyperpod.model.base import Record
from hyperpod.store.index import IdIndex
from hyperpod.store.records import RecordStore, write_atomic
from hyperpod.store.slots import Slots


class Thing(Record):
    name: str
    data: bytes = b""


class State(Record):
    version: int = 0


def store(path: Path) -> RecordStore[Thing, State]:
    return RecordStore(path, "things", Thing, State)


async def test_round_trip_keeps_binary_values(tmp_path: Path) -> None:
    one = store(tmp_path)
    await one.load()
    await one.create("a", Thing(name="x", data=b"\xff\x00"), State())
    await one.update("a", State(version=3))
    found, aside = await store(tmp_path).load()
    assert found == {"a": (Thing(name="x", data=b"\xff\x00"), State(version=3))}
    assert aside == []


async def test_a_successor_finds_what_was_not_synced_yet(tmp_path: Path) -> None:
    one = store(tmp_path)
    await one.load()
    await one.create("a", Thing(name="x"), State())
    await one.update("a", State(version=1), durable=False)
    found, _ = await store(tmp_path).load()
    assert found == {"a": (Thing(name="x"), State(version=1))}


async def test_what_is_gone_again_needs_no_sync(tmp_path: Path) -> None:
    one = store(tmp_path)
    await one.load()
    await one.create("a", Thing(name="x"), State())
    await one.delete("a")
    await one.settle("a")
    assert (await store(tmp_path).load())[0] == {}


async def test_a_folder_without_record_was_never_announced(tmp_path: Path) -> None:
    one = store(tmp_path)
    await one.load()
    await one.create("a", Thing(name="x"), State())
    (tmp_path / "things" / "a" / "record.json").unlink()
    found, aside = await store(tmp_path).load()
    assert (found, aside) == ({}, [])
    assert not (tmp_path / "things" / "a").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"name": 1}', b'{"name": "x", "more": 1}', b"\xff\xfe"])
async def test_damaged_records_are_set_aside(tmp_path: Path, damage: bytes) -> None:
    one = store(tmp_path)
    await one.load()
    await one.create("bad", Thing(name="x"), State())
    await one.create("good", Thing(name="y"), State())
    (tmp_path / "things" / "bad" / "record.json").write_bytes(damage)
    found, aside = await store(tmp_path).load()
    assert list(found) == ["good"]
    assert aside == ["bad"]
    assert (tmp_path / "unreadable" / "things" / "bad" / "record.json").read_bytes() == damage


async def test_delete_is_idempotent(tmp_path: Path) -> None:
    one = store(tmp_path)
    await one.load()
    await one.create("a", Thing(name="x"), State())
    await one.delete("a")
    await one.delete("a")
    assert (await store(tmp_path).load())[0] == {}


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "f"
    write_atomic(target, b"old")
    (tmp_path / ".f.tmp").mkdir()
    with pytest.raises(OSError):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"


def test_prefixes() -> None:
    index: IdIndex[int] = IdIndex("sandbox")
    index.add("aa11", 1)
    index.add("aa22", 2)
    assert index.get("aa1") == 1
    assert index.get("aa22") == 2
    assert index.find("b") is None
    with pytest.raises(NotFound, match="no sandbox 'b'"):
        index.get("b")
    with pytest.raises(InvalidArgument, match="ambiguous"):
        index.find("aa")
    with pytest.raises(InvalidArgument, match="no sandbox id"):
        index.find("")


def test_slots_are_reused_and_bounded() -> None:
    slots = Slots(2)
    assert (slots.take(), slots.take()) == (0, 1)
    with pytest.raises(ResourceExhausted, match="sandbox_slots"):
        slots.take()
    slots.free(0)
    slots.claim(0)
    slots.free(1)
    assert slots.take() == 1
