"""Descriptors and states that a dead shim's successor needs: systemd's FDSTORE in small."""

from __future__ import annotations

from typing import NamedTuple

from hyperpod.errors import ResourceExhausted
from hyperpod.shim.packets import close_all

MAX_NAMES = 1024
MAX_FDS = 2048
"""Per sandbox; a device takes about 15, each container's log one."""
MAX_STATE = 32 * 1024


class Item(NamedTuple):
    state: str
    """JSON, opaque to the supervisor."""
    fds: list[int]


class Store:
    """One sandbox's items by name; owns their descriptors."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}

    def put(self, name: str, state: str, fds: list[int]) -> None:
        """Replace an item; takes the descriptors over. Raises ResourceExhausted, having taken nothing."""
        held = sum(len(item.fds) for other, item in self.items.items() if other != name)
        if held + len(fds) > MAX_FDS or len(self.items) >= MAX_NAMES or len(state) > MAX_STATE:
            raise ResourceExhausted("the shim wants to store too much")
        self.forget(name)
        self.items[name] = Item(state, fds)

    def forget(self, name: str) -> None:
        if (item := self.items.pop(name, None)) is not None:
            close_all(item.fds)

    def clear(self) -> None:
        for name in list(self.items):
            self.forget(name)
