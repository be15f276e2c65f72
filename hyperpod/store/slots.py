"""Small numbers that exist once per live sandbox: they give the uid, the gid and the vsock context id."""

from __future__ import annotations

from hyperpod.errors import ResourceExhausted

FIRST_CID = 0x10000
"""Context ids below are left to other hypervisors of the host; 0 to 2 are reserved (virtio 5.10.4)."""


class Slots:
    """Hands out the lowest free number. The caller persists it in its record before using it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._used: set[int] = set()

    def take(self) -> int:
        """Raises ResourceExhausted when all are in use."""
        for slot in range(self.count):
            if slot not in self._used:
                self._used.add(slot)
                return slot
        raise ResourceExhausted(
            f"all {self.count} sandbox slots are in use; remove pods or raise sandbox_slots"
        )

    def claim(self, slot: int) -> None:
        """Mark a slot of a loaded record as used."""
        self._used.add(slot)

    def free(self, slot: int) -> None:
        self._used.discard(slot)
