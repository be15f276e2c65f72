"""Which streams a guest may still believe in: a table in a memfd that outlives this process.

Written by plain stores, so that a kill at any moment leaves it usable; the successor resets every stream in
it.
"""

from __future__ import annotations

import mmap
import os

from hyperpod.errors import ProtocolError

SLOTS = 1024
_SIZE = SLOTS * 8


class Journal:
    """`SLOTS` pairs of (host port, guest port), zero when free."""

    def __init__(self, fd: int | None = None) -> None:
        """Make a table, or take over `fd`. Raises ProtocolError when `fd` is no such table."""
        if fd is None:
            fd = os.memfd_create("hyperpod-vsock", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        elif os.fstat(fd).st_size != _SIZE:
            raise ProtocolError("not a table of vsock streams")
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._ports = memoryview(self._map).cast("I")
        self._free = [slot for slot in reversed(range(SLOTS)) if not self._ports[2 * slot]]

    def entries(self) -> list[tuple[int, int]]:
        """The (host port, guest port) of every stream in the table."""
        ports = self._ports
        return [(ports[2 * i], ports[2 * i + 1]) for i in range(SLOTS) if ports[2 * i]]

    def add(self, host_port: int, guest_port: int) -> int:
        """Enter a stream; there must be room. Returns its slot."""
        slot = self._free.pop()
        self._ports[2 * slot + 1] = guest_port
        self._ports[2 * slot] = host_port
        return slot

    def remove(self, slot: int) -> None:
        self._ports[2 * slot] = 0
        self._free.append(slot)

    def clear(self) -> None:
        """Forget every stream."""
        for slot in range(SLOTS):
            self._ports[2 * slot] = 0
        self._free = list(reversed(range(SLOTS)))

    def close(self) -> None:
        self._ports.release()
        self._map.close()
        os.close(self.fd)
