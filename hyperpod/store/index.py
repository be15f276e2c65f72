"""Look-up by id, by unique prefix of an id, and reservation of names."""

from __future__ import annotations

from typing import Generic, TypeVar

from hyperpod.errors import InvalidArgument, NotFound

T = TypeVar("T")


class IdIndex(Generic[T]):
    """Objects by 64-digit id; every RPC takes a unique prefix as well."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, ident: str, item: T) -> None:
        self._items[ident] = item

    def discard(self, ident: str) -> None:
        self._items.pop(ident, None)

    def values(self) -> list[T]:
        return list(self._items.values())

    def find(self, ident: str) -> T | None:
        """The object, or None when unknown. Raises InvalidArgument for an empty or an ambiguous prefix."""
        if not ident:
            raise InvalidArgument(f"no {self.what} id given")
        if (item := self._items.get(ident)) is not None:
            return item
        hits = [key for key in self._items if key.startswith(ident)]
        if len(hits) > 1:
            raise InvalidArgument(
                f"{self.what} id {ident!r} is ambiguous: {len(hits)} start with it; give more digits"
            )
        return self._items[hits[0]] if hits else None

    def get(self, ident: str) -> T:
        """As `find`. Raises NotFound when unknown."""
        if (item := self.find(ident)) is None:
            raise NotFound(f"no {self.what} {ident[:80]!r}")
        return item
