"""The guest's serial console: a ring in memory, never a file that a guest could fill."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

log = logging.getLogger(__name__)

RING = 64 * 1024
"""Bytes kept, the newest."""


class ConsoleRing(asyncio.Protocol):
    """Listens for QEMU's serial port; one connection at a time, a new one replaces the old."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ring = bytearray()
        self._server: asyncio.Server | None = None
        self._transport: asyncio.BaseTransport | None = None

    async def open(self) -> None:
        """Listen, replacing what a predecessor left. Raises OSError."""
        Path(self._path).unlink(missing_ok=True)
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: self, self._path)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._transport is not None:
            self._transport.close()
        Path(self._path).unlink(missing_ok=True)

    def tail(self, limit: int) -> bytes:
        """The last `limit` bytes, raw: the guest chose them."""
        return bytes(self._ring[-limit:])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._ring += data[-RING:]
        if len(self._ring) > RING:
            del self._ring[: len(self._ring) - RING]
