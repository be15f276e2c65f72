"""The other end of stdio connections, for tests of the shim: it stands where an agent would, and is none.

It speaks the preface and the frames, serves byte strings instead of pipes, and remembers what was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from hyperpod.errors import ProtocolError
from hyperpod.wire.preface import AgentPreface, Identity, PrefaceRefused
from hyperpod.wire.stdio import FrameDecoder, Open, decode_open, encode_error
from hyperpod.wire.stdioends import AgentSender

Source = Callable[[int], bytes]
"""Up to so many bytes that come next; b"" is the end."""


class Stream:
    """One stream: where its bytes come from, what has been taken and acknowledged."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.sender = AgentSender()
        self.paused = asyncio.Event()  # set: goes on
        self.paused.set()
        self.generation = 0

    def fill(self) -> None:
        while self.paused.is_set() and (room := self.sender.room):
            data = self.source(min(room, 64 * 1024))
            if not data:
                self.sender.finish()
                return
            self.sender.feed(data)


def of_bytes(data: bytes) -> Source:
    """Serves `data`, then the end."""
    position = 0

    def source(room: int) -> bytes:
        nonlocal position
        piece = data[position : position + room]
        position += len(piece)
        return piece

    return source


class StdioPeer:
    """Listens at `<directory>/1025.sock`; `streams` by (container, exec, stream)."""

    def __init__(self, directory: Path, sandbox_id: str, token: bytes) -> None:
        self.path = directory / "1025.sock"
        self.identity = Identity(bytes.fromhex(sandbox_id), token)
        self.streams: dict[tuple[str, str, str], Stream] = {}
        self.scripts: dict[tuple[str, str, str], bytes] = {}
        """Raw frames for whoever opens such a stream."""
        self.opened: list[Open] = []
        self.drop_after = 0
        """Cut each connection after so many acknowledgements; 0: never."""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    def add(self, container: str, stream: str, source: Source, exec_id: str = "") -> Stream:
        self.streams[container, exec_id, stream] = Stream(source)
        return self.streams[container, exec_id, stream]

    async def __aenter__(self) -> StdioPeer:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    @property
    def connected(self) -> int:
        return len(self._writers)

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._connection(reader, writer)
        except (OSError, ProtocolError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        preface = AgentPreface(self.identity, nonce=os.urandom(32))
        while not preface.done:
            data = await reader.read(4096)
            if not data:
                return
            try:
                writer.write(preface.feed(data))
            except PrefaceRefused as exc:
                writer.write(exc.reply)
                return
        decoder = FrameDecoder()
        frames = decoder.feed(preface.trailing)
        while not frames:
            data = await reader.read(65536)
            if not data:
                return
            frames = decoder.feed(data)
        request = decode_open(frames[0])
        self.opened.append(request)
        key = request.container, request.exec_id, request.stream
        if (script := self.scripts.get(key)) is not None:
            writer.write(script)
            await reader.read()
            return
        stream = self.streams.get(key)
        if stream is None:
            writer.write(encode_error("no such stream"))
            return
        stream.generation += 1
        mine, acks = stream.generation, 0
        writer.write(stream.sender.attach(request.from_offset))
        while stream.generation == mine:
            stream.fill()
            writer.writelines(stream.sender.take())
            await writer.drain()
            try:
                async with asyncio.timeout(0.05):
                    data = await reader.read(65536)
            except TimeoutError:
                continue
            if not data:
                return
            for frame in decoder.feed(data):
                stream.sender.receive(frame)
                acks += 1
            if self.drop_after and acks >= self.drop_after:
                writer.transport.abort()
                return
