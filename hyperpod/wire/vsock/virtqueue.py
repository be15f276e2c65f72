"""The device's side of a split virtqueue (virtio 1.2, section 2.7) over a view of guest memory.

Used entries are put in order, so "next entry to take" and `used.idx` never differ after `flush`: a successor
process continues at `used.idx` and at worst repeats a batch that was never published.
"""

from __future__ import annotations

import struct
import threading
from typing import Final, NamedTuple

from hyperpod.errors import ProtocolError
from hyperpod.wire.vsock.memory import GuestMemory

MAX_SIZE: Final = 1024
"""Entries. QEMU 7.2 gives a ring 128 of them, QEMU 10.0 1024; a chain must fit into one sendmsg (IOV_MAX: 1024)."""

_DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, flags, next
_F_NEXT: Final = 1
_F_WRITE: Final = 2
_F_INDIRECT: Final = 4
_NO_KICK: Final = 1  # used.flags: the device asks for no kicks
_NO_INTERRUPT: Final = 1  # avail.flags: the driver asks for no interrupts

# Between our store and the load of the other side's index a full barrier must stand (section 2.7.13.4.1).
# The interpreter offers none; taking a lock is a locked instruction on x86-64, which is one.
_fence_lock: Final = threading.Lock()


def fence() -> None:
    """A full memory barrier (x86-64; on arm64 an acquire and a release, untested)."""
    _fence_lock.acquire(blocking=False)
    _fence_lock.release()


class RingLayout(NamedTuple):
    """Size (a power of two) and QEMU addresses of a ring's three parts."""

    size: int
    descriptors: int
    available: int
    used: int


class Chain(NamedTuple):
    """One buffer offered by the guest: the index of its first descriptor and its non-empty pieces."""

    head: int
    pieces: list[memoryview]


class Virtqueue:
    """Takes chains, gives them back. `writable`: whether its chains are for the device to write."""

    def __init__(
        self,
        memory: GuestMemory,
        layout: RingLayout,
        *,
        writable: bool,
        event_index: bool,
        indirect: bool,
        base: int | None,
    ) -> None:
        """`base` is the next available entry to take; None continues at `used.idx` (after a crash).

        Raises ProtocolError when the ring is not within guest memory or badly aligned.
        """
        size = layout.size
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise ProtocolError(f"ring size {size}")
        if layout.descriptors % 16 or layout.available % 2 or layout.used % 4:
            raise ProtocolError("misaligned ring")
        self._memory = memory
        self._size, self._mask = size, size - 1
        self._want_flags = _F_WRITE if writable else 0
        self._event_index, self._indirect = event_index, indirect
        self._descriptors = memory.user_slice(layout.descriptors, 16 * size)
        # 16-bit views: an index must be read and written by one load or store, never byte by byte.
        self._available = memory.user_slice(layout.available, 6 + 2 * size).cast("H")
        used = memory.user_slice(layout.used, 6 + 8 * size)
        self._used = used.cast("H")
        self._used_ring = used[: 4 + 8 * size].cast("I")
        self._used_index = self._published = self._used[1]
        self._next = self._used_index if base is None else base & 0xFFFF
        self._seen = self._next

    @property
    def next_index(self) -> int:
        """The index of the next available entry to take; what GET_VRING_BASE answers."""
        return self._next

    def pop(self) -> Chain | None:
        """Take the next chain, None when the guest offers none. Raises ProtocolError."""
        index = self._next
        if index == self._seen and not self._refresh():
            return None
        head = self._available[2 + (index & self._mask)]
        pieces = self._walk(head)
        self._next = (index + 1) & 0xFFFF
        return Chain(head, pieces)

    def rewind(self, count: int) -> None:
        """Put back the last `count` chains taken; none of them may have been pushed."""
        self._next = (self._next - count) & 0xFFFF

    def push(self, head: int, written: int) -> None:
        """Give a chain back with `written` bytes in it; the guest sees it at `flush`."""
        slot = 1 + 2 * (self._used_index & self._mask)
        self._used_ring[slot] = head
        self._used_ring[slot + 1] = written
        self._used_index = (self._used_index + 1) & 0xFFFF

    def flush(self) -> bool:
        """Publish what was pushed. True when the guest wants an interrupt for it."""
        old, new = self._published, self._used_index
        if old == new:
            return False
        fence()
        self._used[1] = self._published = new
        fence()
        if not self._event_index:
            return not self._available[0] & _NO_INTERRUPT
        event = self._available[2 + self._size]
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF

    def enable_kicks(self) -> bool:
        """Ask for a kick at the next entry. True when one is there already: then there may be no kick."""
        if self._event_index:
            self._used[2 + 4 * self._size] = self._next
        else:
            self._used[0] = 0
        fence()
        return self._refresh()

    def disable_kicks(self) -> None:
        """Ask for no kicks; with EVENT_IDX silence is the default once an entry was taken."""
        if not self._event_index:
            self._used[0] = _NO_KICK

    def _refresh(self) -> bool:
        seen = self._available[1]
        pending = (seen - self._next) & 0xFFFF
        if pending > self._size:
            raise ProtocolError(f"available index jumped by {pending} in a ring of {self._size}")
        self._seen = seen
        fence()
        return pending != 0

    def _walk(self, head: int) -> list[memoryview]:
        """Follow a chain, at most as many descriptors as the ring has (section 2.7.5.3.1)."""
        table, entries, index = self._descriptors, self._size, head
        pieces: list[memoryview] = []
        inside = False
        for _ in range(self._size + 1):
            if index >= entries:
                raise ProtocolError(f"descriptor {index} of {entries}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & _F_INDIRECT:
                if inside or not self._indirect or flags & _F_NEXT:
                    raise ProtocolError("indirect descriptor where none may be")
                if length % 16 or not 0 < length <= 16 * self._size:
                    raise ProtocolError(f"indirect table of {length} bytes")
                table, entries, index, inside = self._memory.slice(address, length), length // 16, 0, True
                continue
            if flags & _F_WRITE != self._want_flags:
                raise ProtocolError("descriptor of the wrong direction")
            if length:
                pieces.append(self._memory.slice(address, length))
            if not flags & _F_NEXT:
                return pieces
            index = following
        raise ProtocolError("descriptor chain is a loop or longer than its ring")
