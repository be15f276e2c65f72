"""HTTP until the upgrade, from the client's side: plain, over TLS, or on a UNIX socket."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import h11

from hyperpod.errors import InvalidArgument, Unavailable
from hyperpod.streaming.connection import Connection, PlainConnection, Spawn, TlsConnection
from hyperpod.streaming.operator import SCHEME

_ANSWER_TIMEOUT = 60.0
_MAX_ANSWER = 64 * 1024
_CERTIFICATE_HINT = "; does it want a client certificate of its own authority (--tls-cert, --tls-key)?"
"""With TLS 1.3 a server turns a client away after the handshake, and asyncio's says nothing when it does."""


@dataclass(frozen=True)
class Tls:
    """How a server is checked, and what we show it. Without `ca` the system's authorities count."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    """The name that its certificate must have; empty: the URL's."""
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Raises InvalidArgument that names the file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument("--tls-cert and --tls-key belong together")
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            else:
                context.load_default_certs()
        except (OSError, ssl.SSLError) as exc:
            raise InvalidArgument(f"--tls-ca {self.ca}: {exc}") from exc
        try:
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as exc:
            raise InvalidArgument(f"--tls-cert {self.cert}, --tls-key {self.key}: {exc}") from exc
        return context


async def upgraded(
    url: str,
    headers: list[tuple[str, str]],
    method: str = "POST",
    *,
    tls: Tls | None = None,
    spawn: Spawn | None = None,
) -> tuple[socket.socket, bytes]:
    """A socket after the 101 response, and what was read behind it.

    `spawn`: for the task that relays TLS, as long as the socket lives. Raises Unavailable, InvalidArgument.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" and spawn is None:
        raise Unavailable(f"TLS cannot be used here: {url[:100]!r}")
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT):
            connection = await _connect(parts, tls or Tls())
            try:
                early = await _ask(connection, parts, headers, method)
                sock = connection.for_shim().dup()
                connection.handed_over(spawn or _no_task)
            finally:
                connection.close()
    except ssl.SSLError as exc:
        raise _explained(parts.netloc, exc) from exc
    except (OSError, TimeoutError, h11.RemoteProtocolError) as exc:
        hint = _CERTIFICATE_HINT if parts.scheme == "https" else ""
        raise Unavailable(f"cannot reach {unquote(parts.netloc)}: {exc or 'no answer'}{hint}") from exc
    return sock, early


def _no_task(name: str, coro: object) -> None:
    raise AssertionError("a plain connection needs no task")


async def _connect(parts: SplitResult, tls: Tls) -> Connection:
    """Raises OSError (an ssl.SSLError is one), InvalidArgument, Unavailable."""
    if parts.scheme == SCHEME:
        sock, address = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), unquote(parts.netloc)
        context = None
    elif parts.scheme in ("http", "https") and parts.hostname is not None:
        family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        secure = parts.scheme == "https"
        address = (parts.hostname, parts.port or (443 if secure else 80))  # type: ignore[assignment]
        context = tls.context() if secure else None
    else:
        raise Unavailable(f"the daemon answers with a URL of no known kind: {parts.geturl()[:100]!r}")
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is None:
            return PlainConnection(sock)
        name = tls.server_name or parts.hostname or ""
        return await TlsConnection.connect(sock, context, name, _ANSWER_TIMEOUT)
    except BaseException:
        sock.close()
        raise


async def _ask(
    connection: Connection, parts: SplitResult, headers: list[tuple[str, str]], method: str
) -> bytes:
    """What comes behind the 101 response. Raises Unavailable with the server's words, OSError."""
    http = h11.Connection(h11.CLIENT)
    host = "localhost" if parts.scheme == SCHEME else parts.netloc
    request = h11.Request(method=method, target=parts.path, headers=[("Host", host), *headers])
    await connection.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    status, text = 0, b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            data = await connection.read()
            if not data and not status:
                raise ConnectionResetError("it closed the connection without an answer")
            http.receive_data(data)
        elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
            return http.trailing_data[0]
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            text = (text + event.data)[:_MAX_ANSWER]
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            raise Unavailable(f"the server answered {status}: {text.decode(errors='replace').strip()}")


def _explained(where: str, exc: ssl.SSLError) -> Unavailable:
    """With what to do about it."""
    reason = str(exc.reason or exc).lower().replace("_", " ")
    if isinstance(exc, ssl.SSLCertVerificationError):
        return Unavailable(
            f"{where}: its certificate is not accepted: {exc.verify_message}; --tls-ca names the authority to "
            "trust, --tls-server-name the name that the certificate has"
        )
    return Unavailable(f"{where}: TLS failed: {reason}{_CERTIFICATE_HINT}")
