"""A client of streaming URLs, over SPDY: what the exec, attach and port-forward commands speak."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from hyperpod.cli.upgrade import Tls, upgraded
from hyperpod.errors import HyperpodError, ProtocolError, Unavailable
from hyperpod.shim.sessions.socket import Buffer, StreamSocket
from hyperpod.tasks import TaskOwner
from hyperpod.wire import spdy

_GOODBYE = 3.0
"""Seconds for the last bytes to leave through TLS."""
_UNREAD = 1024 * 1024
"""Bytes kept for readers before no more is taken from the server."""


class Stream:
    """One SPDY stream; `read` by one task at a time. Data that is not read holds all streams up: read them."""

    def __init__(self, client: SpdyClient, number: int) -> None:
        self._client, self.number = client, number
        self._chunks: list[Buffer] = []
        self._news = asyncio.Event()
        self.answered = asyncio.Event()
        self.accepted = self.ended = self.was_reset = False

    async def read(self) -> bytes:
        """What has come; empty at the end. Raises Unavailable when it was reset or the connection broke."""
        while not self._chunks:
            if self.ended:
                return b""
            if self.was_reset or self._client.failure is not None:
                raise Unavailable(str(self._client.failure or "the stream was reset"))
            self._news.clear()
            await self._news.wait()
        data, self._chunks = b"".join(self._chunks), []
        self._client.taken(len(data))
        return data

    async def read_all(self) -> bytes:
        """To the end, whether it is a clean one or not."""
        parts = []
        with contextlib.suppress(Unavailable):
            while part := await self.read():
                parts.append(part)
        return b"".join(parts)

    async def write(self, data: Buffer) -> None:
        """Raises Unavailable."""
        self._client.check(self)
        self._client.connection.send_data(self.number, data)
        await self._client.flush()

    async def end(self) -> None:
        """Nothing more will be written."""
        if self._client.connection.can_send(self.number) and self._client.failure is None:
            self._client.connection.end(self.number)
            await self._client.flush()

    async def reset(self) -> None:
        """Over, and forgotten: what has come and nobody has read would hold the others up."""
        self._client.connection.reset(self.number)
        self._client.forget(self.number)
        self._client.taken(sum(map(len, self._chunks)))
        self._chunks.clear()
        with contextlib.suppress(Unavailable):
            await self._client.flush()

    def feed(self, data: Buffer) -> None:
        self._chunks.append(data)
        self._news.set()

    def wake(self) -> None:
        self.answered.set()
        self._news.set()


class Relay:
    """The task between a TLS connection and our socket, if there is one."""

    def __init__(self) -> None:
        self._owner = TaskOwner("stream", limit=1)
        self._task: asyncio.Task[None] | None = None

    def spawn(self, name: str, coro: Coroutine[Any, Any, None]) -> None:
        self._task = self._owner.spawn(name, coro)

    async def finish(self) -> None:
        """Our socket is closed: what it held still goes out."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_GOODBYE)
        await self._owner.close()


class SpdyClient:
    """A connection to one streaming URL."""

    def __init__(self, sock: StreamSocket, early: bytes, relay: Relay | None = None) -> None:
        self.connection = spdy.Connection(spdy.Role.CLIENT, flow_control=spdy.FlowControl.NONE)
        self.failure: HyperpodError | None = None
        self.closed = asyncio.Event()
        self._socket, self._relay = sock, relay
        self._streams: dict[int, Stream] = {}
        self._unread = 0
        self._room = asyncio.Event()
        self._reader = asyncio.ensure_future(self._read(early))

    @classmethod
    async def connect(cls, url: str, protocol: str, tls: Tls | None = None) -> SpdyClient:
        """Raises Unavailable: nobody listens, or the server refuses; its words are in the error."""
        relay = Relay()
        headers = [
            ("Connection", "Upgrade"),
            ("Upgrade", "SPDY/3.1"),
            ("X-Stream-Protocol-Version", protocol),
        ]
        sock, early = await upgraded(url, headers, tls=tls, spawn=relay.spawn)
        return cls(StreamSocket(sock), early, relay)

    async def open(self, headers: spdy.Headers) -> Stream:
        """Raises Unavailable when the server refuses it."""
        number = self.connection.open_stream(headers)
        stream = self._streams[number] = Stream(self, number)
        await self.flush()
        await stream.answered.wait()
        if not stream.accepted:
            self.check(stream)
        return stream

    def check(self, stream: Stream) -> None:
        if self.failure is not None or stream.was_reset:
            raise Unavailable(str(self.failure or "the server refused or reset the stream"))

    async def flush(self) -> None:
        self._socket.write(self.connection.data_to_send())
        try:
            await self._socket.drain()
        except OSError as exc:
            raise Unavailable(f"the connection broke: {exc.strerror}") from exc

    async def close(self) -> None:
        """Goodbye, without waiting for anything."""
        with contextlib.suppress(spdy.SpdyError):
            self.connection.close()
            self._socket.write(self.connection.data_to_send())
        self.abort()
        await asyncio.gather(self._reader, return_exceptions=True)
        if self._relay is not None:
            await self._relay.finish()

    def abort(self) -> None:
        """Gone, without a word."""
        self._reader.cancel()
        self._socket.close()

    async def _read(self, data: bytes) -> None:
        try:
            while True:
                for event in self.connection.receive_data(data):
                    self._handle(event)
                self._socket.write(self.connection.data_to_send())
                while self._unread > _UNREAD:
                    self._room.clear()
                    await self._room.wait()
                data = await self._socket.receive()
                if not data:
                    raise Unavailable("the server closed the connection")
        except spdy.RemoteProtocolError as exc:
            self.failure = ProtocolError(f"SPDY: {exc}")
        except OSError as exc:
            self.failure = Unavailable(f"the connection broke: {exc.strerror}")
        except Unavailable as exc:
            self.failure = exc
        finally:
            self.closed.set()
            for stream in self._streams.values():
                stream.wake()

    def forget(self, number: int) -> None:
        """There are no more events of it."""
        self._streams.pop(number, None)

    def taken(self, count: int) -> None:
        """So many bytes were read."""
        self._unread -= count
        self._room.set()

    def _handle(self, event: spdy.Event) -> None:
        match event:
            case spdy.DataReceived(number, payload):
                self._unread += len(payload)
                self._streams[number].feed(payload)
            case spdy.StreamReplied(number):
                self._streams[number].accepted = True
                self._streams[number].wake()
            case spdy.StreamEnded(number):
                self._streams[number].ended = True
                self._streams[number].wake()
            case spdy.StreamReset(number):
                self._streams[number].was_reset = True
                self._streams[number].wake()
            case spdy.StreamOpened(number):
                self.connection.reset(number, spdy.ResetStatus.REFUSED_STREAM)
