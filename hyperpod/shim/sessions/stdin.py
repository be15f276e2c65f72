"""Input on its way to a process: queued from the client, bounded, and sent as the agent has room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

from hyperpod.errors import DeadlineExceeded, HyperpodError, Unavailable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.direct import PipeEnd, connect, taken
from hyperpod.shim.sessions.socket import Buffer, StreamSocket
from hyperpod.wire.stdio import Open, StreamRefused
from hyperpod.wire.stdioends import StdinSender

log = logging.getLogger(__name__)

LIMIT = 1024 * 1024
"""Bytes queued; then nothing more is read from the client."""
SMALL = 16 * 1024
"""Bytes; less is copied together: views of it would take more room than it, and keep all that was read at once."""

_OPEN_TIMEOUT, _END_TIMEOUT = 10.0, 5.0


class InputQueue:
    """Between the reader of a client and the writer towards the agent."""

    def __init__(self) -> None:
        self._chunks: deque[Buffer] = deque()
        self._size = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._ended = self._dead = False

    @property
    def full(self) -> bool:
        return not self._room.is_set()

    async def room(self) -> None:
        await self._room.wait()

    def put(self, data: bytes | memoryview) -> None:
        if self._dead or self._ended:
            return
        last = self._chunks[-1] if self._chunks else None
        if len(data) >= SMALL:
            self._chunks.append(data)
        elif isinstance(last, bytearray) and len(last) < SMALL:
            last += data
        else:
            self._chunks.append(bytearray(data))
        self._size += len(data)
        self._news.set()
        if self._size >= LIMIT:
            self._room.clear()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def discard(self) -> None:
        """Nobody takes it: what comes is thrown away."""
        self._dead = True
        self._chunks.clear()
        self._size = 0
        self._room.set()

    async def take(self, limit: int) -> list[bytes | memoryview]:
        """The next bytes, at most `limit`, as they came; empty at the end."""
        while not self._chunks:
            if self._ended:
                return []
            self._news.clear()
            await self._news.wait()
        taken: list[bytes | memoryview] = []
        while self._chunks and limit:
            first = self._chunks.popleft()
            data = memoryview(first) if isinstance(first, bytearray) else first
            if len(data) > limit:
                self._chunks.appendleft(memoryview(data)[limit:])
                data = memoryview(data)[:limit]
            taken.append(data)
            limit -= len(data)
            self._size -= len(data)
        if self._size < LIMIT:
            self._room.set()
        return taken


class StdinLink:
    """One connection to the stdin of a process; several attached clients may share it."""

    def __init__(self, dialer: AgentDialer, request: Open) -> None:
        self._dialer = dialer
        self._sender = StdinSender(request)
        self._pipe: PipeEnd | None = None
        self._turn = asyncio.Lock()
        self._socket: StreamSocket | None = None
        self._acks: asyncio.Task[None] | None = None
        self._opened = asyncio.Event()
        self._moved = asyncio.Event()
        self._failure: HyperpodError | None = None

    async def open(self) -> None:
        """Raises StreamRefused (the process has no stdin), Unavailable, DeadlineExceeded."""
        self._socket, data = await connect(self._dialer)
        self._socket.write([self._sender.start()])
        self._acks = asyncio.ensure_future(self._read(self._socket, data))
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                await self._opened.wait()
        except TimeoutError as exc:
            raise DeadlineExceeded(f"the agent did not open the input within {_OPEN_TIMEOUT:g} s") from exc
        if self._failure is not None:
            raise self._failure
        if self._sender.handed_over:
            self._pipe = PipeEnd(taken(self._socket))

    async def _read(self, link: StreamSocket, data: bytes) -> None:
        try:
            while True:
                self._sender.feed(data)
                if self._sender.opened:
                    self._opened.set()
                self._moved.set()
                data = await link.receive()
                if not data:
                    raise Unavailable("the process's stdin was closed")
        except HyperpodError as exc:
            self._failure = exc
        except OSError as exc:
            self._failure = Unavailable(f"the process's stdin: {exc.strerror}")
        finally:
            self._opened.set()
            self._moved.set()

    async def pump(self, queue: InputQueue) -> None:
        """Bring the queue's bytes to the process until it ends. Raises Unavailable when that stops working."""
        assert self._socket is not None
        if self._pipe is not None:
            await _fill(self._pipe, queue)
            return
        while True:
            async with self._turn:
                room = await self._room(1)
            pieces = await queue.take(room)
            if not pieces:
                return
            async with self._turn:
                await self._room(sum(map(len, pieces)))  # another client may have used it up meanwhile
                for piece in pieces:
                    self._socket.write(self._sender.data(piece))
                await self._drain()

    async def _room(self, wanted: int) -> int:
        """Wait until the agent takes so many bytes; gives how many it takes. Raises Unavailable."""
        while self._sender.room < wanted:
            if self._failure is not None or self._sender.finished:
                raise Unavailable(str(self._failure or "the process's input has ended"))
            self._moved.clear()
            await self._moved.wait()
        return self._sender.room

    async def end(self) -> None:
        """The process sees the end of its input."""
        async with self._turn:
            if self._pipe is not None:
                self._pipe.close()  # and by the EOF the agent closes its own
            if self._socket is not None and self._failure is None and not self._sender.finished:
                self._socket.write([self._sender.finish()])
                self._moved.set()
                with contextlib.suppress(Unavailable):
                    await self._drain()

    async def _drain(self) -> None:
        assert self._socket is not None
        try:
            await self._socket.drain()
        except OSError as exc:
            raise Unavailable(f"the process's stdin: {exc.strerror}") from exc

    async def leave(self) -> None:
        """Close once the agent has taken what is under way: a plain close would destroy it together with the
        acknowledgements that nobody has read."""
        await self._stop_reading()
        if self._socket is not None and self._failure is None:
            await self._socket.finish()
        await self.close()

    async def close(self) -> None:
        """At once."""
        await self._stop_reading()
        if self._pipe is not None:
            self._pipe.close()
        if self._socket is not None:
            self._socket.close()

    async def _stop_reading(self) -> None:
        if self._acks is not None:
            self._acks.cancel()
            await asyncio.gather(self._acks, return_exceptions=True)


async def _fill(pipe: PipeEnd, queue: InputQueue) -> None:
    """Raises Unavailable: the process reads no more."""
    try:
        while pieces := await queue.take(LIMIT):
            await pipe.write(pieces)
    except OSError as exc:
        raise Unavailable(f"the process's stdin: {exc.strerror}") from exc


class SharedStdins:
    """The containers' stdins that attached clients write to: one connection each, for as long as one needs it."""

    def __init__(self, dialer: AgentDialer) -> None:
        self._dialer = dialer
        self._links: dict[str, tuple[StdinLink, int]] = {}
        self._changing = asyncio.Lock()

    async def run(self, container: str, queue: InputQueue, *, once: bool) -> None:
        """Pump until the queue ends; input of a container without stdin is thrown away."""
        try:
            link = await self._acquire(container)
        except HyperpodError as exc:
            if not isinstance(exc, StreamRefused):
                log.info("input for %s: %s", container[:12], exc)
            queue.discard()
            return
        try:
            await link.pump(queue)
        except Unavailable as exc:
            log.info("input for %s: %s", container[:12], exc)
            queue.discard()
        finally:
            await asyncio.shield(self._done(container, link, once=once))

    async def _done(self, container: str, link: StdinLink, *, once: bool) -> None:
        if once:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_TIMEOUT):  # another client may be at it
                    await link.end()
        await self._release(container)

    async def _acquire(self, container: str) -> StdinLink:
        async with self._changing:
            link, users = self._links.get(container, (None, 0))
            if link is None:
                link = StdinLink(self._dialer, Open(container, "stdin"))
                try:
                    await link.open()
                except BaseException:
                    await link.close()
                    raise
            self._links[container] = link, users + 1
            return link

    async def _release(self, container: str) -> None:
        async with self._changing:
            link, users = self._links[container]
            if users > 1:
                self._links[container] = link, users - 1
                return
            del self._links[container]
            await link.leave()
