"""Attach: a container's output, as its log gets it, for whoever listens at the moment.

The log comes first and is what counts. A client that reads slowly slows the container down, as everywhere; one
that takes nothing for STALL seconds while its queue is full is cut off, so that it cannot stop the log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from hyperpod.errors import ResourceExhausted
from hyperpod.shim.sessions.socket import Buffer
from hyperpod.shim.sessions.stdin import SMALL

LIMIT = 1024 * 1024
"""Bytes queued for one client."""
STALL = 5.0
"""Seconds."""


class Tap:
    """One listener. `get` gives (stream, data) in order, None at the end of all its streams."""

    def __init__(self, fanout: Fanout, streams: Iterable[str]) -> None:
        self._fanout = fanout
        self._open = set(streams)
        self._queue: deque[tuple[str, Buffer]] = deque()
        self._size = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._cut = False

    async def get(self) -> tuple[str, bytes | memoryview] | None:
        """Raises ResourceExhausted for who was too slow."""
        while not self._queue:
            if self._cut:
                raise ResourceExhausted(
                    f"the client took nothing for {STALL:g} s; see the log for what follows"
                )
            if not self._open:
                return None
            self._news.clear()
            await self._news.wait()
        stream, data = self._queue.popleft()
        self._size -= len(data)
        if self._size < LIMIT:
            self._room.set()
        return stream, memoryview(data) if isinstance(data, bytearray) else data

    def close(self) -> None:
        """Listen no more."""
        self._fanout.remove(self)
        self._room.set()

    def put(self, stream: str, data: bytes | memoryview) -> None:
        if stream in self._open and not self._cut:
            last, buffer = self._queue[-1] if self._queue else ("", b"")
            if len(data) >= SMALL:
                self._queue.append((stream, data))
            elif last == stream and isinstance(buffer, bytearray) and len(buffer) < SMALL:
                buffer += data
            else:
                self._queue.append((stream, bytearray(data)))
            self._size += len(data)
            self._news.set()
            if self._size >= LIMIT:
                self._room.clear()

    def end(self, stream: str) -> None:
        self._open.discard(stream)
        self._news.set()

    @property
    def full(self) -> bool:
        return not self._room.is_set()

    async def room(self) -> None:
        """Wait until the client has taken some, at most STALL seconds after it last did."""
        while not self._room.is_set():
            before = self._size
            try:
                async with asyncio.timeout(STALL):
                    await self._room.wait()
            except TimeoutError:
                if self._size >= before:
                    self._cut = True
                    self._news.set()
                    self.close()


class Fanout:
    """The listeners of one container."""

    def __init__(self, streams: Iterable[str]) -> None:
        self._streams = tuple(streams)
        self._taps: set[Tap] = set()
        self._ended: set[str] = set()
        self._published = dict.fromkeys(self._streams, 0)

    def tap(self, streams: Iterable[str]) -> Tap:
        """Listen from now on."""
        made = Tap(self, (s for s in streams if s in self._streams and s not in self._ended))
        self._taps.add(made)
        return made

    def remove(self, tap: Tap) -> None:
        self._taps.discard(tap)

    async def publish(self, stream: str, offset: int, data: bytes | memoryview) -> None:
        """Bytes of the stream at `offset`; what was published before (they come again) is left out."""
        known = self._published[stream]
        self._published[stream] = max(known, offset + len(data))
        if offset < known:
            data = data[known - offset :]
        if data and self._taps:
            for tap in self._taps:
                tap.put(stream, data)
            if full := [tap for tap in self._taps if tap.full]:
                await asyncio.gather(*(tap.room() for tap in full))  # their patience must not add up

    def end(self, stream: str) -> None:
        self._ended.add(stream)
        for tap in self._taps:
            tap.end(stream)

    def close(self) -> None:
        """Nothing more comes, whatever the reason."""
        for stream in self._streams:
            self.end(stream)
