"""One SEQPACKET connection for asyncio, which has no messages with descriptors of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from hyperpod.errors import Unavailable
from hyperpod.shim import packets


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Channel:
    """Owns a connected, non-blocking socket. One reader and any number of writers at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()

    async def receive(self) -> tuple[bytes, list[int]]:
        """The next message and its descriptors, the caller's to close; b"" at the end. Raises ProtocolError."""
        while True:
            try:
                return packets.receive(self.sock)
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
            except OSError:
                return b"", []

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Raises Unavailable when the other side is gone."""
        async with self._sending:
            while True:
                try:
                    packets.send(self.sock, data, fds)
                except BlockingIOError:
                    await self._wait(self._loop.add_writer, self._loop.remove_writer)
                except OSError as exc:
                    raise Unavailable(f"control connection lost: {exc.strerror}") from exc
                else:
                    return

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock.fileno())
            self._loop.remove_writer(self.sock.fileno())
            self.sock.close()

    async def _wait(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        fd = self.sock.fileno()
        if fd < 0:
            raise Unavailable("control connection closed")
        ready: asyncio.Future[None] = self._loop.create_future()
        add(fd, _resolve, ready)
        try:
            await ready
        finally:
            if self.sock.fileno() == fd:
                remove(fd)
