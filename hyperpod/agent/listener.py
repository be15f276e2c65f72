"""The agent's two ports: who may connect, the preface, and then the protocol of the port."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable

from hyperpod.wire.preface import NONCE_LEN, TIMEOUT, AgentPreface, Identity, PrefaceRefused

log = logging.getLogger(__name__)

CONTROL_PORT, STDIO_PORT = 1024, 1025
HOST_CID = 2
VMADDR_CID_ANY = 0xFFFFFFFF
BACKLOG = 128
MAX_UNPROVEN = 64
_GRND_INSECURE = 4
"""Never blocks: the nonce needs to be fresh, and the random pool of a young guest may not be ready."""


def listen_vsock(port: int) -> socket.socket:
    """For a guest: any CID of its own."""
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.bind((VMADDR_CID_ANY, port))
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def listen_unix(directory: str, port: int, uid: int | None = None) -> socket.socket:
    """For a host agent: `<directory>/<port>.sock`, for root, or for the user `uid` and root."""
    path = f"{directory}/{port}.sock"
    made = f"{directory}/.{port}.sock"
    if os.path.exists(made):
        os.unlink(made)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(made)
    os.chmod(made, 0o600)
    if uid is not None:
        os.chown(made, uid, -1)
    sock.listen(BACKLOG)
    os.rename(made, path)  # who sees it can connect
    sock.setblocking(False)
    return sock


def is_host(sock: socket.socket, uid: int | None = None) -> bool:
    """Whether the peer is the host (vsock); root, or the user `uid` (Unix socket)."""
    if sock.family == socket.AF_UNIX:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.unpack("3i", raw)[1] in (0, uid)
    cid: int = sock.getpeername()[0]
    return cid == HOST_CID


class _Preface(asyncio.Protocol):
    """The first protocol of a connection; hands the transport on when the peer has proven itself."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._preface = AgentPreface(listener.identity, nonce=os.getrandom(NONCE_LEN, _GRND_INSECURE))
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        listener = self._listener
        sock = transport.get_extra_info("socket")
        try:
            welcome = is_host(sock, listener.uid)
        except OSError:
            welcome = False
        if not welcome or listener.unproven >= MAX_UNPROVEN or listener.connected >= listener.limit:
            log.warning("port %d: connection refused", listener.port)
            transport.abort()
            return
        self._transport = transport
        listener.unproven += 1
        self._timer = asyncio.get_running_loop().call_later(TIMEOUT, transport.abort)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            reply = self._preface.feed(data)
        except PrefaceRefused as exc:
            log.warning("port %d: %s", self._listener.port, exc)
            transport.write(exc.reply)
            transport.close()
            return
        if reply:
            transport.write(reply)
        if self._preface.done:
            self._hand_on(transport)

    def _hand_on(self, transport: asyncio.Transport) -> None:
        self._settle()
        protocol = self._listener.make_protocol()
        counted = _Counted(protocol, self._listener)
        transport.set_protocol(counted)
        counted.connection_made(transport)
        if trailing := self._preface.trailing:
            counted.data_received(trailing)

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._listener.unproven -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()


class _Counted(asyncio.Protocol):
    """Passes everything on, and counts the connection for the listener's limit."""

    def __init__(self, inner: asyncio.Protocol, listener: Listener) -> None:
        self._listener = listener
        self._inner = inner
        self.data_received = inner.data_received  # type: ignore[method-assign]  # no layer per chunk
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._listener.add(transport)
        self._transport = transport
        self._inner.connection_made(transport)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.discard(self._transport)
        self._inner.connection_lost(exc)


class Listener:
    """One port. At most `limit` proven connections."""

    def __init__(
        self, port: int, identity: Identity, make_protocol: Callable[[], asyncio.Protocol], limit: int
    ) -> None:
        self.port, self.identity, self.make_protocol, self.limit = port, identity, make_protocol, limit
        self.unproven = 0
        self.uid: int | None = None
        """Who may connect beside root, to a host agent."""
        self._transports: set[asyncio.Transport] = set()
        self._server: asyncio.Server | None = None

    @property
    def connected(self) -> int:
        return len(self._transports)

    async def start(self, sock: socket.socket) -> None:
        """Serve on a listening, non-blocking socket."""
        loop = asyncio.get_running_loop()
        make = lambda: _Preface(self)  # noqa: E731  # the factory needs no name of its own
        if sock.family == socket.AF_UNIX:
            self._server = await loop.create_unix_server(make, sock=sock, backlog=BACKLOG)
        else:
            self._server = await loop.create_server(make, sock=sock, backlog=BACKLOG)

    def add(self, transport: asyncio.Transport) -> None:
        self._transports.add(transport)

    def discard(self, transport: asyncio.Transport) -> None:
        self._transports.discard(transport)

    def close(self) -> None:
        """Stop listening and close every connection."""
        if self._server is not None:
            self._server.close()
        for transport in list(self._transports):
            transport.close()
