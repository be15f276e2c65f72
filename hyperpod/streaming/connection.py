"""A client's connection before its upgrade: plain, or TLS with the daemon in between."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from hyperpod.shim.sessions.socket import under_way

_READ = 8 * 1024
"""Bytes; also what may come behind the request, see shim.sessions.spec.MAX_EARLY."""
_RELAY = 256 * 1024
_LINGER = 2.0
_PATIENCE, _LOOK = 3600.0, 0.05
"""Seconds that a client may take nothing at a session's end, as while its user reads a page; and between looks."""

Spawn = Callable[[str, Coroutine[Any, Any, None]], object]


class Connection(Protocol):
    """What the HTTP part needs."""

    async def read(self) -> bytes:
        """Some bytes, empty at the end. Raises OSError."""

    async def write(self, data: bytes) -> None:
        """Raises OSError."""

    def for_shim(self) -> socket.socket:
        """A plain socket for the shim, which stays ours to close; asked for once, then `handed_over`."""

    def handed_over(self, spawn: Spawn) -> None:
        """The shim has the socket."""

    async def finish(self) -> None:
        """Everything is written: let the client go first, for a moment."""

    def close(self) -> None:
        """At once; nothing when it was handed over."""


class PlainConnection:
    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._loop = sock, asyncio.get_running_loop()

    async def read(self) -> bytes:
        return await self._loop.sock_recv(self._sock, _READ)

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    def for_shim(self) -> socket.socket:
        return self._sock

    def handed_over(self, spawn: Spawn) -> None:
        self._sock.close()

    async def finish(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LINGER):
                while await self.read():
                    pass

    def close(self) -> None:
        self._sock.close()


class TlsConnection:
    """The daemon encrypts and decrypts; the shim gets one end of a socket pair."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, plain: asyncio.Transport
    ) -> None:
        """`plain` carries what `writer` encrypts."""
        self._reader, self._writer, self._plain = reader, writer, plain
        self._ours: socket.socket | None = None
        self._theirs: socket.socket | None = None
        self._relayed = False

    @classmethod
    async def accept(cls, sock: socket.socket, context: ssl.SSLContext, timeout: float) -> TlsConnection:
        """Raises OSError (an ssl.SSLError is one) when the handshake fails."""
        return await cls._begin(sock, context, None, timeout)

    @classmethod
    async def connect(
        cls, sock: socket.socket, context: ssl.SSLContext, name: str, timeout: float
    ) -> TlsConnection:
        """The client's side, for the command line; `name`: the server's. Raises as `accept`."""
        return await cls._begin(sock, context, name, timeout)

    @classmethod
    async def _begin(
        cls, sock: socket.socket, context: ssl.SSLContext, name: str | None, timeout: float
    ) -> TlsConnection:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_RELAY, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        # In two steps, to have the plain transport: nothing else tells what still waits in it.
        plain, _ = await loop.connect_accepted_socket(asyncio.Protocol, sock)
        try:
            transport = await loop.start_tls(
                plain, protocol, context, server_side=name is None, server_hostname=name,
                ssl_handshake_timeout=timeout, ssl_shutdown_timeout=_LINGER,
            )  # fmt: skip
        except BaseException:
            plain.abort()
            raise
        if transport is None:
            raise ConnectionAbortedError("the other side left during the TLS handshake")
        protocol.connection_made(transport)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop), plain)

    async def read(self) -> bytes:
        return await self._reader.read(_READ)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def for_shim(self) -> socket.socket:
        self._ours, self._theirs = socket.socketpair()
        return self._theirs

    def handed_over(self, spawn: Spawn) -> None:
        assert self._ours is not None
        assert self._theirs is not None
        self._theirs.close()
        self._ours.setblocking(False)
        spawn("tls", self._relay(self._ours))
        self._relayed = True

    async def _relay(self, sock: socket.socket) -> None:
        tasks = [asyncio.ensure_future(self._up(sock)), asyncio.ensure_future(self._down(sock))]
        try:
            # The shim's end says when it is over; the client's only that it sends nothing more.
            await asyncio.wait({tasks[1]})
            await self._delivered()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            sock.close()
            self._writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_LINGER):
                    await self._writer.wait_closed()

    async def _delivered(self) -> None:
        """Until the client's kernel has all: a close may lose what it has not, and that is the session's end."""
        loop, before, since = asyncio.get_running_loop(), -1, 0.0
        while left := self._left():
            if left != before:
                before, since = left, loop.time()
            if self._plain.is_closing() or loop.time() - since > _PATIENCE:
                return
            await asyncio.sleep(_LOOK)

    def _left(self) -> int:
        """Bytes, those with our kernel included."""
        buffered = self._writer.transport.get_write_buffer_size() + self._plain.get_write_buffer_size()
        fd: int = self._plain.get_extra_info("socket").fileno()
        return buffered + (under_way(fd) if fd >= 0 else 0)

    async def _up(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await self._reader.read(_RELAY):
                await loop.sock_sendall(sock, data)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    async def _down(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(sock, _RELAY):
                self._writer.write(data)
                await self._writer.drain()

    async def finish(self) -> None:
        """Closing TLS tells the client; nothing needs to be waited for."""

    def close(self) -> None:
        if not self._relayed:
            for sock in (self._ours, self._theirs):
                if sock is not None:
                    sock.close()
            self._writer.close()
