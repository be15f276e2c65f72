"""A connection to a port of the pod: as frames from its agent, or its socket where the agent hands it over."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from hyperpod.errors import HyperpodError, Unavailable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.direct import connect, taken
from hyperpod.shim.sessions.socket import Buffer, StreamSocket
from hyperpod.wire.portpipe import HostPort
from hyperpod.wire.stdio import StreamRefused


class PortBroke(HyperpodError):
    """The connection was made, and the pod's side broke it off: its own affair, no failure of the forwarding."""


class PodPort:
    """Each method raises PortBroke, and HyperpodError when the agent or its connection fails."""

    async def receive(self) -> Sequence[Buffer]:
        """What has come; empty at the end."""
        raise NotImplementedError

    async def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Returns once there is room for more."""
        raise NotImplementedError

    async def end(self) -> None:
        """Nothing more will be sent."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


async def open_port(dialer: AgentDialer, number: int) -> PodPort:
    """Raises HyperpodError that tells why it cannot be reached."""
    link, data = await connect(dialer)
    framed = FramedPort(link, HostPort(number, direct=dialer.direct))
    try:
        await framed.open(data)
        if not framed.pipe.handed_over:
            return framed
        port = DirectPort(taken(link), number)
    except BaseException:
        link.close()
        raise
    link.close()
    return port


class FramedPort(PodPort):
    """`wire.portpipe` on a connection to the agent."""

    def __init__(self, link: StreamSocket, pipe: HostPort) -> None:
        self.pipe = pipe
        self._link = link
        self._early: list[bytes | memoryview] = []

    async def open(self, data: bytes) -> None:
        self._link.write([self.pipe.start()])
        self._early = self._feed(data)
        while not self.pipe.opened:
            self._early += self._feed(await self._receive())

    async def receive(self) -> Sequence[Buffer]:
        payloads, self._early = self._early or self._feed(b""), []
        while not payloads and not self.pipe.ended:
            payloads = self._feed(await self._receive())
        return payloads

    def _feed(self, data: bytes) -> list[bytes | memoryview]:
        try:
            return self.pipe.feed(data)
        except StreamRefused as exc:
            if self.pipe.opened:
                raise PortBroke(str(exc)) from exc
            raise

    async def _receive(self) -> bytes:
        try:
            data = await self._link.receive()
        except OSError as exc:
            raise _gone(exc) from exc
        if not data:
            raise Unavailable("the sandbox's agent went away")
        return data

    async def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        for piece in pieces:
            self._link.write(self.pipe.data(piece))
        await self._drain()

    async def end(self) -> None:
        self._link.write([self.pipe.finish()])
        await self._drain()

    async def _drain(self) -> None:
        try:
            await self._link.drain()
        except OSError as exc:  # why the agent has closed it, or that it is gone, is still to be read
            raise PortBroke(f"the connection to the sandbox's agent broke: {exc.strerror}") from exc

    def close(self) -> None:
        self._link.close()


class DirectPort(PodPort):
    """The TCP socket itself."""

    def __init__(self, fd: int, number: int) -> None:
        self._link, self._number = StreamSocket(socket.socket(fileno=fd)), number

    async def receive(self) -> Sequence[Buffer]:
        try:
            data = await self._link.receive()
        except OSError as exc:
            raise self._broken(exc) from exc
        return [data] if data else []

    async def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        self._link.write(pieces)
        try:
            await self._link.drain()
        except OSError as exc:
            raise self._broken(exc) from exc

    async def end(self) -> None:
        try:
            await self._link.shut()
        except OSError as exc:
            raise self._broken(exc) from exc

    def _broken(self, exc: OSError) -> PortBroke:
        return PortBroke(f"the connection to port {self._number} broke: {exc.strerror}")

    def close(self) -> None:
        self._link.close()


def _gone(exc: OSError) -> HyperpodError:
    return Unavailable(f"the sandbox's agent went away: {exc.strerror}")
