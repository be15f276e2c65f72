"""What every session does: read the client, watch the clock, end well with whoever is still there."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine
from typing import Any, Protocol

from hyperpod.errors import ProtocolError
from hyperpod.logs import printable
from hyperpod.shim.sessions.socket import Buffer, StreamSocket
from hyperpod.shim.sessions.spec import SessionSpec

log = logging.getLogger(__name__)

_WATCH = 30.0
"""Seconds between looks at the clock."""


class ClientGone(Exception):
    """The client left, broke the protocol or was idle for too long: nothing more can be told to it."""


class Outgoing(Protocol):
    """The part of a sans-IO session that is the same for all; `key` names a channel or a connection."""

    def room(self, key: Any, /) -> int: ...

    def send(self, key: Any, data: Buffer, /) -> None: ...

    def data_to_send(self) -> list[Buffer]: ...


class Session:
    """One client. Subclasses give `_receive`, which handles what was read, and `_serve`, which is the work."""

    def __init__(self, sock: socket.socket, spec: SessionSpec, protocol: Outgoing) -> None:
        self.spec = spec
        self.client = StreamSocket(sock)
        self._outgoing = protocol
        self._room = asyncio.Event()

    async def run(self) -> None:
        """Until the work is done or the client has gone."""
        self.client.write([self.spec.head])
        reading = asyncio.ensure_future(self._read())
        serving = asyncio.ensure_future(self._serve())
        watching = asyncio.ensure_future(self._watch())
        tasks = (serving, reading, watching)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
            elif not reading.done():
                # Still read: a client that writes on must not be held up before it has heard the end.
                await self._deliver(reading, watching)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self.client.close()
            self._say(results)

    async def _deliver(self, reading: asyncio.Task[None], watching: asyncio.Task[None]) -> None:
        draining = asyncio.ensure_future(self.client.delivered())
        try:
            await asyncio.wait({draining, reading, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            draining.cancel()
            reading.cancel()
            await asyncio.gather(draining, reading, return_exceptions=True)
        await self.client.finish()

    def _say(self, results: tuple[BaseException | None, ...]) -> None:
        for result in results:
            if isinstance(result, ClientGone | OSError):
                log.info("%s: %s", self.spec.kind, printable(str(result), 300))
            elif isinstance(result, Exception):
                log.error("%s failed: %r", self.spec.kind, result, exc_info=result)

    def flush(self) -> None:
        """Send what the protocol has to say."""
        self.client.write(self._outgoing.data_to_send())

    async def to_client(self, key: int, data: Buffer) -> None:
        """Returns once the client has room for more. Raises ClientGone."""
        view = memoryview(data)
        while view:
            room = self._outgoing.room(key)
            if room == 0:
                self._room.clear()
                await self._room.wait()
                continue
            piece, view = view[:room], view[room:]
            self._outgoing.send(key, piece)
            self.flush()
            try:
                await self.client.drain()
            except OSError as exc:
                raise ClientGone(f"the client's connection broke: {exc.strerror}") from exc

    async def _read(self) -> None:
        """Raises ClientGone, OSError."""
        data = self.spec.early
        while True:
            try:
                await self._receive(data)
                self._room.set()
            except ProtocolError as exc:
                raise ClientGone(f"the client broke the protocol: {exc}") from exc
            finally:
                self.flush()  # a goodbye, too, is answered
            data = await self.client.receive()
            if not data:
                raise ClientGone("the client closed the connection")

    async def _watch(self) -> None:
        """Raises ClientGone when nothing went either way for the idle time."""
        loop = asyncio.get_running_loop()
        while True:
            silent = loop.time() - self.client.active
            if self.spec.idle and silent >= self.spec.idle:
                raise ClientGone(f"idle for {self.spec.idle:g} s")
            await asyncio.sleep(min(_WATCH, self.spec.idle - silent) if self.spec.idle else _WATCH)

    async def _receive(self, data: bytes) -> None:
        """Take bytes of the client. Raises ProtocolError, ClientGone."""
        raise NotImplementedError

    def _serve(self) -> Coroutine[Any, Any, None]:
        """The work; when it returns, everything has been written and the connection is closed."""
        raise NotImplementedError


def first(exc: BaseException) -> BaseException:
    """What a task group failed of first."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
