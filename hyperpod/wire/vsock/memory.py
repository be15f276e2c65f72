"""The guest's memory as a few views: bounds-checked access by guest address or by QEMU's own address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hyperpod.errors import ProtocolError


class Region(NamedTuple):
    """One contiguous piece of guest memory: `view` is writable and as long as the region."""

    guest_address: int
    user_address: int  # where QEMU has it mapped; SET_VRING_ADDR speaks in these
    view: memoryview


class GuestMemory:
    """At most eight regions. A buffer must lie within one: guests allocate within a memory block."""

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        self._guest = [(r.guest_address, r.guest_address + len(r.view), r.view) for r in regions]
        self._user = [(r.user_address, r.user_address + len(r.view), r.view) for r in regions]
        # The largest region first: nearly every buffer is in it.
        self._guest.sort(key=lambda entry: entry[0] - entry[1])
        for (start, end, _), (other, other_end, _) in _pairs(self._guest):
            if start < other_end and other < end:
                raise ProtocolError("overlapping regions in the memory table")

    def slice(self, address: int, length: int) -> memoryview:
        """The `length` bytes at guest address `address`. Raises ProtocolError unless all are guest memory."""
        for start, end, view in self._guest:
            if start <= address and address + length <= end:
                return view[address - start : address - start + length]
        raise ProtocolError(f"guest address {address:#x}+{length:#x} is outside guest memory")

    def user_slice(self, address: int, length: int) -> memoryview:
        """Like `slice`, by QEMU's address."""
        for start, end, view in self._user:
            if start <= address and address + length <= end:
                return view[address - start : address - start + length]
        raise ProtocolError(f"ring address {address:#x}+{length:#x} is outside guest memory")


def _pairs(
    entries: list[tuple[int, int, memoryview]],
) -> list[tuple[tuple[int, int, memoryview], tuple[int, int, memoryview]]]:
    return [(a, b) for i, a in enumerate(entries) for b in entries[i + 1 :]]
