"""Port-forward: many connections of one client, each with one of its own to the agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from hyperpod.errors import HyperpodError, Unavailable
from hyperpod.logs import printable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.session import ClientGone, Session, first
from hyperpod.shim.sessions.socket import StreamSocket
from hyperpod.shim.sessions.spec import SessionSpec
from hyperpod.shim.sessions.stdin import InputQueue
from hyperpod.tasks import TaskOwner
from hyperpod.wire.portforward import (
    MAX_CONNECTIONS,
    Dial,
    Dropped,
    Forward,
    ForwardEnded,
    ForwardEvent,
    ForwardLeft,
    port_forward,
)
from hyperpod.wire.portpipe import HostPort

log = logging.getLogger(__name__)

_AT_ONCE = 256 * 1024
_TEXT = 500


class Forwarded:
    """One connection: what the client sends waits in `up`."""

    def __init__(self, port: int) -> None:
        self.port, self.up = port, InputQueue()
        self.task: asyncio.Task[None] | None = None


class ForwardSession(Session):
    """Goes on until the client leaves, or (WebSocket) until its last port has ended."""

    def __init__(self, sock: socket.socket, spec: SessionSpec, dialer: AgentDialer) -> None:
        self.protocol = port_forward(spec.transport, spec.protocol, spec.ports)
        super().__init__(sock, spec, self.protocol)
        self._dialer = dialer
        self._connections: dict[int, Forwarded] = {}
        self._owner = TaskOwner("forward", limit=MAX_CONNECTIONS + 1)
        self._over = asyncio.Event()

    async def run(self) -> None:
        try:
            self._handle(self.protocol.start())
            if not self._connections and not self.protocol.half_close:
                self._over.set()  # a WebSocket without any ports
            await super().run()
        finally:
            await self._owner.close()

    async def _receive(self, data: bytes) -> None:
        self._handle(self.protocol.receive(data))
        for one in list(self._connections.values()):
            if one.up.full:
                self.flush()
                await self.client.hold(one.up.room())

    def _handle(self, events: list[ForwardEvent]) -> None:
        for event in events:
            match event:
                case Dial(ident, port):
                    self._dial(ident, port)
                case Forward(ident, payload):
                    if (one := self._connections.get(ident)) is not None:
                        one.up.put(payload)
                    self.protocol.consumed(ident, len(payload))
                case ForwardEnded(ident):
                    if (one := self._connections.get(ident)) is not None:
                        one.up.end()
                case Dropped(ident):
                    one = self._connections.get(ident)
                    if one is not None and one.task is not None:
                        one.task.cancel()
                case ForwardLeft():
                    raise ClientGone("the client said goodbye")

    def _dial(self, ident: int, port: int) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            self.protocol.fail(ident, f"there are {MAX_CONNECTIONS} connections already")
            return
        one = self._connections[ident] = Forwarded(port)
        one.task = self._owner.spawn(f"{port}/{ident}", self._connection(ident, one))

    async def _serve(self) -> None:
        """Watch over connections that do not become complete."""
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.spec.creation):
                    await self._over.wait()
            self.protocol.expire()
            self.flush()

    async def _connection(self, ident: int, one: Forwarded) -> None:
        try:
            await self._relay(ident, one)
            self.protocol.close(ident)
        except (HyperpodError, ExceptionGroup) as exc:
            cause = first(exc)
            if isinstance(cause, HyperpodError):
                self.protocol.fail(ident, f"error forwarding port {one.port}: {printable(str(cause), _TEXT)}")
            elif not isinstance(cause, ClientGone):  # its reader notices as well
                raise
        finally:
            one.up.discard()
            self._connections.pop(ident, None)
            self.flush()
            if not self._connections and not self.protocol.half_close:
                self._over.set()

    async def _relay(self, ident: int, one: Forwarded) -> None:
        """Raises HyperpodError, ExceptionGroup."""
        sock, data = await self._dialer.open()
        link, pipe = StreamSocket(sock), HostPort(one.port)
        try:
            link.write([pipe.start()])
            early = pipe.feed(data)
            while not pipe.opened:
                early += pipe.feed(await _receive(link))
            async with asyncio.TaskGroup() as group:
                up = group.create_task(self._up(link, pipe, one))
                await self._down(ident, link, pipe, early)
                if not self.protocol.half_close:
                    up.cancel()
        finally:
            link.close()

    async def _up(self, link: StreamSocket, pipe: HostPort, one: Forwarded) -> None:
        while pieces := await one.up.take(_AT_ONCE):
            for piece in pieces:
                link.write(pipe.data(piece))
            await _drain(link)
        link.write([pipe.finish()])
        await _drain(link)

    async def _down(
        self, ident: int, link: StreamSocket, pipe: HostPort, payloads: list[bytes | memoryview]
    ) -> None:
        while True:
            for payload in payloads:
                await self.to_client(ident, payload)
            if pipe.ended:
                self.protocol.end(ident)
                self.flush()
                return
            payloads = pipe.feed(await _receive(link))


async def _receive(link: StreamSocket) -> bytes:
    """Raises Unavailable at the end."""
    try:
        data = await link.receive()
    except OSError as exc:
        raise Unavailable(f"the sandbox's agent went away: {exc.strerror}") from exc
    if not data:
        raise Unavailable("the sandbox's agent went away")
    return data


async def _drain(link: StreamSocket) -> None:
    try:
        await link.drain()
    except OSError as exc:
        raise Unavailable(f"the sandbox's agent went away: {exc.strerror}") from exc
