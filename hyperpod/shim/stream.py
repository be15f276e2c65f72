"""One stream of one container, from the agent to its log (and then to who is attached): connect, read, write,
acknowledge, reconnect."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import Protocol

from hyperpod.errors import HyperpodError, Unavailable
from hyperpod.logs import printable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.tap import Fanout
from hyperpod.wire.crilog import LineFormatter
from hyperpod.wire.stdio import Frame, Open
from hyperpod.wire.stdioends import HostReader

log = logging.getLogger(__name__)

CHUNK = 128 * 1024
"""Bytes to read at once, and so the most that one batch makes into records."""
_ACK_TIMEOUT = 30.0
_FIRST_RETRY, _LAST_RETRY = 0.05, 2.0
_SELDOM = 5.0
"""Seconds from one line about a stream in our own log to the next."""


class Sink(Protocol):
    """Where records go; what ContainerLog is to its streams."""

    turn: asyncio.Lock
    """Held from the look at an offset to the write that moves it."""

    def offset(self, stream: str) -> int: ...

    def has_ended(self, stream: str) -> bool: ...

    async def write(self, stream: str, offset: int, records: list[bytes], gap: int = 0) -> None:
        """Returns once the records are in the file, however long that takes; the caller holds `turn`."""

    async def end(self, stream: str) -> None:
        """The stream's EOF, after its last write; the caller holds `turn`."""


class StreamPump:
    """`run` it as a task; it ends when the stream's EOF is written."""

    def __init__(self, container: str, stream: str, dialer: AgentDialer, sink: Sink, fanout: Fanout) -> None:
        self._container, self._stream = container, stream
        self._dialer, self._sink, self._fanout = dialer, sink, fanout
        self._formatter: LineFormatter | None = None
        self._progress = False
        self._lost = 0
        self._told = -_SELDOM

    def _seldom(self) -> bool:
        """Whether something may be logged that the guest can bring about."""
        due = (now := time.monotonic()) - self._told >= _SELDOM
        self._told = now if due else self._told
        return due

    async def run(self) -> None:
        delay, said = _FIRST_RETRY, ""
        while not self._sink.has_ended(self._stream):
            self._progress = False
            try:
                await self._connection()
                continue
            except (HyperpodError, OSError) as exc:
                if str(exc) != said and self._seldom():
                    said = str(exc)
                    log.warning(
                        "%s of %s: %s; trying again", self._stream, self._container[:12], printable(said, 500)
                    )
            delay = _FIRST_RETRY if self._progress else min(2 * delay, _LAST_RETRY)
            await asyncio.sleep(delay)
        self._fanout.end(self._stream)

    async def write_tail(self) -> None:
        """Write an unfinished last line now: it is not known whether anything follows."""
        async with self._sink.turn:
            if self._formatter is not None and (records := self._formatter.finish(time.time_ns())):
                await self._sink.write(self._stream, self._formatter.offset, records)

    async def _connection(self) -> None:
        """From connect to EOF. Raises HyperpodError or OSError when it ends before."""
        loop = asyncio.get_running_loop()
        sock, data = await self._dialer.open()
        with sock:
            async with self._sink.turn:
                # An unfinished line of the last connection was not acknowledged: it comes again.
                offset = self._sink.offset(self._stream)
                self._formatter = formatter = LineFormatter(self._stream, offset)
            reader = HostReader(Open(self._container, self._stream, from_offset=offset))
            await loop.sock_sendall(sock, reader.start())
            while True:
                frames = reader.feed(data)
                await self._take(frames, reader, formatter)
                for frame in frames:
                    await self._fanout.publish(self._stream, frame.offset, frame.payload)
                await self._acknowledge(sock, reader, formatter)
                if reader.eof:
                    return
                data = await loop.sock_recv(sock, CHUNK)
                if not data:
                    raise Unavailable("its connection ended before its EOF")

    async def _take(self, frames: list[Frame], reader: HostReader, formatter: LineFormatter) -> None:
        pieces: list[bytes | memoryview] = []
        due = formatter.offset + formatter.held
        async with self._sink.turn:
            for frame in frames:
                if frame.offset != due:
                    await self._write(formatter, pieces)
                    await self._skip(formatter, frame.offset)
                    pieces, due = [], frame.offset
                pieces.append(frame.payload)
                due += len(frame.payload)
            await self._write(formatter, pieces)
            if reader.offset != due:
                await self._skip(formatter, reader.offset)
            if reader.eof:
                if records := formatter.finish(time.time_ns()):
                    await self._sink.write(self._stream, formatter.offset, records)
                await self._sink.end(self._stream)

    async def _write(self, formatter: LineFormatter, pieces: list[bytes | memoryview]) -> None:
        if pieces and (records := formatter.feed(pieces, time.time_ns())):
            self._progress = True
            await self._sink.write(self._stream, formatter.offset, records)

    async def _skip(self, formatter: LineFormatter, offset: int) -> None:
        """A gap. Its end is written apart from what follows: a log alone does not show it."""
        if records := formatter.finish(time.time_ns()):
            await self._sink.write(self._stream, formatter.offset, records)
        gap = offset - formatter.offset
        formatter.skip_to(offset, time.time_ns())
        self._lost += gap
        if self._seldom():  # a guest may make as many gaps as it likes
            log.error("%s of %s: %d bytes are lost", self._stream, self._container[:12], self._lost)
            self._lost = 0
        await self._sink.write(self._stream, offset, [], gap)

    async def _acknowledge(self, sock: socket.socket, reader: HostReader, formatter: LineFormatter) -> None:
        if formatter.offset > reader.acked:
            async with asyncio.timeout(_ACK_TIMEOUT):
                await asyncio.get_running_loop().sock_sendall(sock, reader.ack(formatter.offset))
