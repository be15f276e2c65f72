"""A registry token (a bearer token made elsewhere) for skopeo, which takes one only as an argument.

Arguments are readable by every user of the host. So skopeo asks this proxy on a loopback port instead, proves
itself by a password that lives as long as the pull (in its 0600 authfile), and the proxy asks the registry
with the token. Only GET and HEAD below /v2/ are handed on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import secrets
import ssl
from collections.abc import AsyncIterator

from hyperpod.errors import InvalidArgument
from hyperpod.image.reference import DEFAULT_HOST
from hyperpod.model.images import RegistryAuth

log = logging.getLogger(__name__)
MAX_HEAD = 65536
"""Bytes of a request's or an answer's head."""
_PIECE = 1 << 18
_TIMEOUT = 60.0
_USER = "hyperpod"
_REFUSED = b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm="registry"\r\n'


class TokenProxy:
    """Stands in for the registry `host`; `address` and `credentials` are for skopeo."""

    def __init__(self, host: str, token: str, *, plain: bool) -> None:
        if not token.isascii() or not token.isprintable() or " " in token:
            raise InvalidArgument("the registry token of the credentials is not printable ASCII")
        self._host = "registry-1.docker.io" if host == DEFAULT_HOST else host
        self._plain, self._token = plain, token
        self._password = secrets.token_urlsafe(32)
        pair = base64.b64encode(f"{_USER}:{self._password}".encode()).decode()
        self._wanted = f"Basic {pair}"
        self.address = ""

    @property
    def credentials(self) -> RegistryAuth:
        return RegistryAuth(username=_USER, password=self._password)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listen until the end of the block; connections are cut then."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=MAX_HEAD)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request per connection."""
        try:
            await self._answer(reader, writer)
        except (
            OSError,
            TimeoutError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            ValueError,
        ) as exc:
            log.info("registry %s by token: %s", self._host, type(exc).__name__)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_TIMEOUT):
            first = await reader.readexactly(1)
            if first == b"\x16":
                return None  # a TLS handshake: skopeo tries that first, and plain HTTP when it is cut off
            method, path, headers = _request(first + await reader.readuntil(b"\r\n\r\n"))
        if not hmac.compare_digest(headers.get("authorization", ""), self._wanted):
            writer.write(_REFUSED + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
            return await writer.drain()
        if method not in ("GET", "HEAD") or not path.startswith("/v2/"):
            raise ValueError(method)
        kept = {k: v for k, v in headers.items() if k in ("accept", "range", "user-agent")}
        kept |= {"host": self._host, "authorization": f"Bearer {self._token}", "connection": "close"}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in kept.items()) + "\r\n"
        async with asyncio.timeout(_TIMEOUT):
            source, sink = await self._connect()
        try:
            sink.write(head.encode("latin-1"))
            async with asyncio.timeout(_TIMEOUT):
                writer.write(self._rewrite(await source.readuntil(b"\r\n\r\n")))
            while True:
                async with asyncio.timeout(_TIMEOUT):
                    piece = await source.read(_PIECE)
                    writer.write(piece)
                    await writer.drain()
                if not piece:
                    return None
        finally:
            sink.close()
            with contextlib.suppress(OSError):
                await sink.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name, _, port = self._host.rpartition(":") if ":" in self._host else (self._host, "", "")
        name = name.strip("[]")
        if self._plain:
            return await asyncio.open_connection(name, int(port or 80), limit=MAX_HEAD)
        context = ssl.create_default_context()
        return await asyncio.open_connection(name, int(port or 443), ssl=context, limit=MAX_HEAD)

    def _rewrite(self, head: bytes) -> bytes:
        """The answer's head: no challenge of another scheme, redirects to the registry itself stay here."""
        lines = head.decode("latin-1").split("\r\n")
        kept = [lines[0]]
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            if name.lower() in ("connection", "www-authenticate"):
                continue
            if name.lower() == "location":
                for scheme in ("http://", "https://"):
                    value = value.strip().removeprefix(f"{scheme}{self._host}")
                line = f"{name}: {value}"  # noqa: PLW2901  the line as it is sent on
            kept.append(line)
        if " 401 " in f"{lines[0]} ":
            kept.append('WWW-Authenticate: Basic realm="registry"')
        return "\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1")


def _request(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, path, headers by lower-case name. Raises ValueError."""
    lines = head.decode("latin-1").split("\r\n")
    method, path, _ = lines[0].split(" ")
    headers: dict[str, str] = {}
    for line in lines[1:-2]:
        name, _, value = line.partition(":")
        key = name.strip().lower()  # Go sends each Accept on a line of its own
        headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
    return method, path, headers
