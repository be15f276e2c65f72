"""Port-forward: many connections of one client, each with one of its own to the agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from hyperpod.errors import HyperpodError
from hyperpod.logs import printable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.port import PodPort, PortBroke, open_port
from hyperpod.shim.sessions.session import ClientGone, Session, first
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

log = logging.getLogger(__name__)

_AT_ONCE = 256 * 1024
_TEXT = 500


class Forwarded:
    """One connection: what the client sends waits in `up`."""

    def __init__(self, port: int) -> None:
        self.port, self.up = port, InputQueue()
        self.task: asyncio.Task[None] | None = None


class ForwardSession(Session):
    """Goes on until the client leaves, or (WebSocket) until its last port has ended.

    `everybodys`: connections of all sessions of the pod. Its agent takes so many, and logs and execs need theirs.
    """

    def __init__(
        self, sock: socket.socket, spec: SessionSpec, dialer: AgentDialer, everybodys: set[Forwarded]
    ) -> None:
        self.protocol = port_forward(spec.transport, spec.protocol, spec.ports)
        super().__init__(sock, spec, self.protocol)
        self._dialer, self._everybodys = dialer, everybodys
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
        if len(self._everybodys) >= MAX_CONNECTIONS:
            self.protocol.fail(ident, f"the pod has {MAX_CONNECTIONS} forwarded connections already")
            return
        one = self._connections[ident] = Forwarded(port)
        self._everybodys.add(one)
        one.task = self._owner.spawn(f"{port}/{ident}", self._connection(ident, one))
        # Not by the task itself: one that is cancelled before its first step never runs.
        one.task.add_done_callback(lambda _: self._ended(ident, one))

    def _ended(self, ident: int, one: Forwarded) -> None:
        one.up.discard()
        self._connections.pop(ident, None)
        self._everybodys.discard(one)
        self.flush()
        if not self._connections and not self.protocol.half_close:
            self._over.set()

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
                text = f"error forwarding port {one.port}: {printable(str(cause), _TEXT)}"
                end = self.protocol.broke if isinstance(cause, PortBroke) else self.protocol.fail
                end(ident, text)
            elif not isinstance(cause, ClientGone):  # its reader notices as well
                raise

    async def _relay(self, ident: int, one: Forwarded) -> None:
        """Raises HyperpodError, ExceptionGroup."""
        port = await open_port(self._dialer, one.port)
        try:
            async with asyncio.TaskGroup() as group:
                up = group.create_task(self._up(port, one))
                while payloads := await port.receive():
                    for payload in payloads:
                        await self.to_client(ident, payload)
                self.protocol.end(ident)
                self.flush()
                if not self.protocol.half_close:
                    up.cancel()
        finally:
            port.close()

    async def _up(self, port: PodPort, one: Forwarded) -> None:
        try:
            while pieces := await one.up.take(_AT_ONCE):
                await port.send(pieces)
            await port.end()
        except PortBroke:  # what it has answered before is still to be read: that tells the end
            one.up.discard()
