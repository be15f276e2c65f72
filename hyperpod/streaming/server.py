"""HTTP until the upgrade: who has a token gets a stream, everybody else a clear answer, and nobody may linger."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable

import h11

from hyperpod.config import StreamingConfig
from hyperpod.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from hyperpod.streaming.connection import Connection, PlainConnection, TlsConnection
from hyperpod.streaming.tls import Certificates
from hyperpod.streaming.tokens import LIFETIME, Target, Tokens
from hyperpod.tasks import TaskOwner
from hyperpod.wire.upgrade import Refused, Upgrade, negotiate

log = logging.getLogger(__name__)

KINDS = ("exec", "attach", "portforward")
REQUEST_TIMEOUT = 10.0
"""Seconds from the connection to the whole request, TLS handshake included."""
PENDING = 128
"""Connections without a request yet; a new one ends the oldest."""
ANSWERING = 256
"""Connections being answered or handed over; beyond, new ones are closed."""
RELAYS = 512
"""TLS connections at once that the daemon relays."""
_MAX_HEADERS = 16 * 1024
_MAX_BODY = 16 * 1024
_BACKLOG = 512

HandOver = Callable[[Target, Upgrade, socket.socket, bytes, bytes], Awaitable[None]]
"""Gives the socket to the shim, with the HTTP response and what the client has sent behind its request.

Raises HyperpodError: then nothing has been written to the client.
"""

_STATUS: tuple[tuple[type[HyperpodError], int], ...] = (
    (NotFound, 404),
    (FailedPrecondition, 409),
    (InvalidArgument, 400),
    (ResourceExhausted, 429),
    (Unavailable, 503),
    (DeadlineExceeded, 503),
)
_REASONS = {400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 409: "Conflict",
            413: "Content Too Large", 429: "Too Many Requests", 500: "Internal Server Error",
            503: "Service Unavailable"}  # fmt: skip


class StreamingServer:
    """Listens on one address."""

    kinds: tuple[str, ...] = KINDS

    def __init__(self, config: StreamingConfig, tokens: Tokens, hand_over: HandOver) -> None:
        """Raises InvalidArgument: the certificates cannot be used."""
        self._config, self._tokens, self._hand_over = config, tokens, hand_over
        self._certificates: Certificates | None = None
        if config.tls_cert is not None and config.tls_key is not None:
            self._certificates = Certificates(config.tls_cert, config.tls_key, config.tls_client_ca)
        self._owner = TaskOwner("streaming", limit=PENDING + ANSWERING)
        self._relays = TaskOwner("streaming-tls", limit=RELAYS)
        self._pending: dict[asyncio.Task[None], None] = {}  # oldest first
        self._sock: socket.socket | None = None
        self._base = ""

    async def listen(self) -> None:
        """Raises FailedPrecondition: the address is taken or not ours."""
        sock, self._base = await self._bind()
        self._sock = sock
        self._owner.spawn("accept", self._accept(sock))
        log.info("streaming on %s", self._base)

    async def _bind(self) -> tuple[socket.socket, str]:
        """A listening socket, and what URLs begin with."""
        address, port = self._config.address, self._config.port
        version = ipaddress.ip_address(address)
        sock = socket.socket(socket.AF_INET if version.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError as exc:
            sock.close()
            raise FailedPrecondition(
                f"streaming: cannot listen on {address} port {port}: {exc.strerror}; see streaming.port"
            ) from exc
        host = address if not version.is_unspecified else "127.0.0.1" if version.version == 4 else "::1"
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if self._certificates is not None else "http"
        if self._certificates is None and not version.is_loopback:
            log.warning("streaming: %s is not a loopback address and there is no TLS", address)
        return sock, f"{scheme}://{host}:{sock.getsockname()[1]}"

    def url(self, target: Target) -> str:
        """Where the target can be had, once, for a minute. Raises ResourceExhausted."""
        return f"{self._base}/{target.kind}/{self._tokens.issue(target)}"

    async def close(self) -> None:
        """Sessions in the shims go on; those through TLS end."""
        await self._owner.close()
        if self._sock is not None:  # not while `accept` watches it: its number may be another's by then
            self._sock.close()
        await self._relays.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as exc:
                log.warning("streaming: accept: %s", exc.strerror)
                await asyncio.sleep(0.1)
                continue
            while len(self._pending) >= PENDING:
                oldest = next(iter(self._pending))
                del self._pending[oldest]
                oldest.cancel()
                await asyncio.gather(oldest, return_exceptions=True)
            if len(self._owner) >= self._owner.limit:
                sock.close()
                continue
            task = self._owner.spawn("client", self._client(sock))
            self._pending[task] = None
            task.add_done_callback(lambda done: self._pending.pop(done, None))

    def _admit(self, sock: socket.socket) -> None:
        """Look at who comes, and set what the socket needs. Raises OSError."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)

    async def _client(self, sock: socket.socket) -> None:
        connection: Connection = PlainConnection(sock)
        try:
            sock.setblocking(False)
            self._admit(sock)
            async with asyncio.timeout(REQUEST_TIMEOUT):
                if self._certificates is not None:
                    context = self._certificates.context()
                    connection = await TlsConnection.accept(sock, context, REQUEST_TIMEOUT)
                http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADERS)
                request = await _request(http, connection)
            if (task := asyncio.current_task()) is not None:
                self._pending.pop(task, None)
            if request is not None:
                await self._answer(http, request, connection)
        except TimeoutError:
            log.info("streaming: a client sent no whole request within %g s", REQUEST_TIMEOUT)
        except OSError as exc:
            log.info("streaming: %s", exc)
        finally:
            connection.close()

    async def _answer(self, http: h11.Connection, request: h11.Request, connection: Connection) -> None:
        try:
            if self._certificates is not None and len(self._relays) >= RELAYS:
                raise ResourceExhausted(f"{RELAYS} TLS sessions run already")
            target, upgrade = self._route(request)
            head = http.send(
                h11.InformationalResponse(
                    status_code=101, headers=list(upgrade.headers), reason=b"Switching Protocols"
                )
            )
            assert head is not None
            early, _ = http.trailing_data
            await self._hand_over(target, upgrade, connection.for_shim(), head, early)
        except Refused as exc:
            await _refuse(connection, exc.status, str(exc), exc.headers)
        except HyperpodError as exc:
            status = next((status for kind, status in _STATUS if isinstance(exc, kind)), 500)
            log.info("streaming: %s", exc)
            extra = (("Retry-After", f"{LIFETIME:.0f}"),) if status == 429 else ()
            await _refuse(connection, status, str(exc), extra)
        else:
            connection.handed_over(self._relays.spawn)

    def _route(self, request: h11.Request) -> tuple[Target, Upgrade]:
        """Raises Refused."""
        path, _, _ = request.target.decode("latin-1").partition("?")
        parts = path.split("/")
        if len(parts) != 3 or parts[0] or parts[1] not in self.kinds or not parts[2]:
            raise Refused(
                404, "there is nothing here: streams begin with the URL of an Exec, Attach or PortForward"
            )
        if request.method not in (b"GET", b"POST"):
            raise Refused(405, "GET or POST", (("Allow", "GET, POST"),))
        # Negotiated first: a client that is refused may try another protocol with the same token.
        upgrade = negotiate(list(request.headers), forward=parts[1] == "portforward")
        if (target := self._tokens.redeem(parts[1], parts[2])) is None:
            raise Refused(404, f"the token is unknown, used, or older than {LIFETIME:.0f} s")
        return target, upgrade


async def _request(http: h11.Connection, connection: Connection) -> h11.Request | None:
    """The whole request; None when the client left, or was told what is wrong. Raises OSError."""
    request, body = None, 0
    while True:
        try:
            event = http.next_event()
        except h11.RemoteProtocolError as exc:
            await _refuse(connection, exc.error_status_hint, str(exc))
            return None
        if event is h11.NEED_DATA:
            http.receive_data(data := await connection.read())
            if not data and request is None:
                return None
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += len(event.data)
            if body > _MAX_BODY:
                await _refuse(connection, 413, "a streaming request has no body")
                return None
        elif isinstance(event, h11.EndOfMessage):
            return request
        else:
            return None


async def _refuse(
    connection: Connection, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """Answer and be done. Raises OSError."""
    body = (text[:4096] + "\n").encode()
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers),
    ]
    await connection.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await connection.finish()
