"""Items of the list replies, encoded once per change and kept; a reply is their join.

A kubelet lists everything every second; the join of kept bytes takes well under a millisecond. A repeated
message field is the concatenation of tag, length and bytes of each item, and the list replies, whole or
streamed, have their items in field 1; so the join is what encoding the whole reply gives, byte for byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from betterproto2 import Message

from hyperpod.model.base import Record
from hyperpod.rpc.encode import delimited, encode

TAG = b"\x0a"
"""Field 1, length-delimited."""

BATCH = 64
"""Items encoded before other tasks get their turn: a few milliseconds."""

PAGE = 256
"""Items of one message of a streamed list."""


class Encoded:
    """What a handler returns in place of a message when it has the bytes already (see hyperpod.rpc.encode)."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


async def joined(items: Iterable[Message]) -> Encoded:
    """A reply whose field 1 is these, each encoded in a turn of its own: for items of some hundred fields."""
    parts = []
    for item in items:
        parts.append(TAG + delimited(encode(item)))
        await asyncio.sleep(0)
    return Encoded(b"".join(parts))


class Listed(Protocol):
    """A container or a sandbox: record and status are replaced, never changed."""

    @property
    def id(self) -> str: ...
    @property
    def record(self) -> Record: ...
    @property
    def status(self) -> Record: ...


L = TypeVar("L", bound=Listed)


class ListCodec(Generic[L]):
    """The items of one kind. `item` makes the message of one, out of nothing but its record and status."""

    def __init__(self, item: Callable[[L], Message]) -> None:
        self._item = item
        self._kept: dict[str, tuple[Record, Record, bytes]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def warm(self, everything: Collection[L]) -> None:
        """Encode what is not kept yet, others getting their turn: after a start that is everything at once.

        The items chosen for a reply must be chosen after this: they may change meanwhile."""
        if len(everything) > len(self._kept) + BATCH:
            for number, one in enumerate(everything, 1):
                self._part(one)
                if number % BATCH == 0:
                    await asyncio.sleep(0)

    def reply(self, chosen: Iterable[L], everything: Collection[L]) -> Encoded:
        """A list reply of `chosen`. What is not in `everything` any more is forgotten."""
        self._forget(everything)
        return Encoded(b"".join([self._part(one) for one in chosen]))

    def pages(self, chosen: Sequence[L], everything: Collection[L]) -> list[Encoded]:
        """The same as messages of at most PAGE items each; none for an empty list."""
        return [self.reply(chosen[at : at + PAGE], everything) for at in range(0, len(chosen), PAGE)]

    def _part(self, one: L) -> bytes:
        record, status = one.record, one.status
        kept = self._kept.get(one.id)
        # By identity, not by version: a status whose write failed leaves its number to another one.
        if kept is None or kept[0] is not record or kept[1] is not status:
            kept = (record, status, TAG + delimited(encode(self._item(one))))
            self._kept[one.id] = kept
        return kept[2]

    def _forget(self, everything: Collection[L]) -> None:
        if len(self._kept) > len(everything):
            known = {one.id for one in everything}
            self._kept = {ident: kept for ident, kept in self._kept.items() if ident in known}
