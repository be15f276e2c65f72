"""A gRPC server on a UNIX socket: the parts of this package put together."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.const import Handler as Method
from grpclib.protocol import H2Protocol
from grpclib.server import Server

from hyperpod.errors import FailedPrecondition
from hyperpod.rpc.codec import Codec
from hyperpod.rpc.connection import MESSAGE_LIMIT, Life, RpcHandler, RpcProtocol
from hyperpod.rpc.interceptor import guarded

__all__ = ["MESSAGE_LIMIT", "RpcServer"]

WINDOW = 1024 * 1024
"""Bytes in flight to us, per connection and per stream."""

CANCEL_WAIT = 5.0
"""Seconds that cancelled calls get to clean up."""


class _Server(Server):
    def __init__(self, services: Collection[Any]) -> None:
        config = Configuration(http2_connection_window_size=WINDOW, http2_stream_window_size=WINDOW)
        super().__init__(services, codec=Codec(), config=config)
        self.life = Life()
        self._mapping = {name: self._guarded(name, method) for name, method in self._mapping.items()}

    def _guarded(self, name: str, method: Method) -> Method:
        handler = guarded(name, method.func, lambda: self.life.closing)
        return Method(handler, method.cardinality, method.request_type, method.reply_type)

    def _protocol_factory(self) -> H2Protocol:
        self.__gc_step__()
        handler = RpcHandler(
            self.life, self._mapping, self._codec, self._status_details_codec, self.__dispatch__
        )
        self._handlers.add(handler)
        return RpcProtocol(self.life, handler, self._config, self._h2_config)

    def running(self) -> list[asyncio.Task[None]]:
        return [task for handler in self._handlers for task in cast(RpcHandler, handler).running()]


class RpcServer:
    """gRPC services on a UNIX socket that only root may use."""

    def __init__(self, services: Sequence[Any]) -> None:
        self._server = _Server(services)
        self._path: Path | None = None

    async def listen(self, path: Path) -> None:
        """Raises FailedPrecondition when somebody listens there already."""
        sock = await asyncio.to_thread(listening, path)
        self._path = path
        await self._server.start(sock=sock)

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve one connected socket (tests, and agents that accept by themselves)."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(cast(Any, partial(self._server._protocol_factory)), sock)

    def running(self) -> int:
        """Calls that have not ended."""
        return len(self._server.running())

    async def close(self, seconds: float) -> None:
        """No new connections and calls; running calls get `seconds`, then UNAVAILABLE; then the end."""
        server, life = self._server, self._server.life
        if server._server is not None:
            server._server.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        life.draining = True
        for protocol in list(life.protocols):
            protocol.announce_end()
        if running := server.running():
            await asyncio.wait(running, timeout=seconds)
        life.closing = True
        if left := server.running():
            for task in left:
                if not task.cancelling():
                    task.cancel()
            await asyncio.wait(left, timeout=CANCEL_WAIT)
        for protocol in list(life.protocols):
            protocol.end()


def listening(path: Path) -> socket.socket:
    """A listening socket that nobody else could reach before its mode is 0600; a stale file is replaced.

    Raises FailedPrecondition, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
    if path.exists():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                pass
            else:
                raise FailedPrecondition(f"something listens on {path} already")
    folder = path.parent / f".{secrets.token_hex(2)}"  # short: such paths have 107 bytes at most
    folder.mkdir(mode=0o700)
    made = folder / "s"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(made))
        made.chmod(0o600)
        sock.listen(128)
        made.replace(path)
    except OSError:
        sock.close()
        made.unlink(missing_ok=True)
        raise
    finally:
        folder.rmdir()
    sock.setblocking(False)
    return sock
