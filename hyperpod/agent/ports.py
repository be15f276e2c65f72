"""The `port` stream: a TCP connection to a port of the pod, 127.0.0.1 first, then ::1."""

from __future__ import annotations

import asyncio
import os
import socket

from hyperpod.agent.streams import Peer
from hyperpod.errors import HyperpodError
from hyperpod.tasks import TaskOwner
from hyperpod.wire.portpipe import PortEnd
from hyperpod.wire.stdio import Frame, Open, encode_handover, encode_opened

CONNECT_TIMEOUT = 10.0
HIGH_WATER = 256 * 1024
"""Bytes towards the port that are queued here before the host is held up."""

_PLACES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


async def connect(port: int) -> socket.socket:
    """Raises HyperpodError that tells why neither address answers."""
    loop, reasons = asyncio.get_running_loop(), []
    for family, address in _PLACES:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as exc:  # no IPv6 here
            reasons.append(f"{address}: {exc.strerror}")
            continue
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await loop.sock_connect(sock, (address, port))
            return sock
        except TimeoutError:
            reasons.append(f"{address}: no answer")
        except OSError as exc:
            reasons.append(f"{address}: {os.strerror(exc.errno or 0)}")
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise HyperpodError(f"port {port} of the pod cannot be reached: {', '.join(reasons)}")


class PortStream(asyncio.Protocol):
    """Made for one stdio connection; the protocol of the TCP connection as well."""

    def __init__(self, owner: TaskOwner, port: int) -> None:
        self._owner, self._port = owner, port
        self._end = PortEnd()
        self._peer: Peer | None = None
        self._tcp: asyncio.Transport | None = None
        self._dialling: asyncio.Task[None] | None = None

    # -- the stdio side -----------------------------------------------------------------------------------

    def attach(self, peer: Peer, what: Open) -> None:
        self._peer = peer
        self._dialling = self._owner.spawn(f"port/{self._port}", self._dial(peer, direct=what.direct))

    def detach(self, peer: Peer) -> None:
        self._peer = None
        if self._dialling is not None:
            self._dialling.cancel()
        if self._tcp is not None:
            self._tcp.abort()

    def flush(self) -> None:
        """The peer takes data again."""
        if self._tcp is not None:
            self._tcp.resume_reading()

    def receive(self, frame: Frame) -> None:
        """Raises ProtocolError."""
        payload = self._end.take(frame)
        if self._tcp is None or self._tcp.is_closing():
            return  # the host may only send once it is connected; what comes after a break is of no use
        if payload:
            self._tcp.write(payload)
        elif self._tcp.can_write_eof():
            self._tcp.write_eof()
            self._close_when_done()

    async def _dial(self, peer: Peer, *, direct: bool) -> None:
        try:
            sock = await connect(self._port)
        except HyperpodError as exc:
            peer.drop(str(exc))
            return
        if direct and peer.send_with(encode_opened(0) + encode_handover(0), sock.fileno()):
            sock.close()
            peer.finish()
            return
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self, sock=sock)
        except OSError as exc:
            sock.close()
            peer.drop(f"port {self._port}: {exc.strerror}")

    # -- the TCP side -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._peer is None:
            transport.abort()
            return
        self._tcp = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._peer.send([encode_opened(0)])

    def data_received(self, data: bytes) -> None:
        if self._peer is None or self._tcp is None:
            return
        self._peer.send(self._end.data(data))
        if not self._peer.writable:
            self._tcp.pause_reading()

    def eof_received(self) -> bool:
        if self._peer is not None and not self._end.finished:
            self._peer.send([self._end.finish()])
        self._close_when_done()
        return True  # what the host still sends goes there

    def connection_lost(self, exc: Exception | None) -> None:
        peer = self._peer
        if peer is None:
            return
        if exc is not None or not self._end.finished:
            peer.drop(f"the connection to port {self._port} broke: {exc or 'it was closed'}")
        else:
            peer.finish()

    def pause_writing(self) -> None:
        if self._peer is not None:
            self._peer.hold(True)

    def resume_writing(self) -> None:
        if self._peer is not None:
            self._peer.hold(False)

    def _close_when_done(self) -> None:
        if self._end.ended and self._end.finished and self._tcp is not None:
            self._tcp.close()
