"""The server. Each class says which defect of grpclib 0.4.9 it works around; each has a test."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.const import Handler as Method
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from grpclib.protocol import Connection, H2Protocol, Stream
from grpclib.server import Handler, Server
from h2.settings import SettingCodes

from hyperpod.errors import FailedPrecondition
from hyperpod.rpc.interceptor import guarded

log = logging.getLogger(__name__)

MESSAGE_LIMIT = 16 * 1024 * 1024
"""Bytes of one request, as containerd's and the kubelet's limit."""

MAX_STREAMS = 4096
"""Concurrent RPCs of one connection; grpclib's 100 let a hundred slow calls starve Version."""

WINDOW = 1024 * 1024

_PEERCRED = struct.Struct("3i")


class _Codec(CodecBase):
    """betterproto2 messages; a request that does not parse is the caller's fault, not an unknown error."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        try:
            return message_type.parse(data)
        except Exception as exc:
            raise GRPCError(
                Status.INVALID_ARGUMENT, f"{message_type.__name__} does not parse: {exc}"
            ) from exc


class _LimitedStream(Stream):
    """Refuses messages over the limit before a byte of them is kept, and compressed ones with a reason."""

    async def recv_data(self, size: int) -> bytes:
        if size > MESSAGE_LIMIT:
            raise GRPCError(
                Status.RESOURCE_EXHAUSTED, f"the request has {size} bytes, at most {MESSAGE_LIMIT} are taken"
            )
        data = await super().recv_data(size)
        if size == 5 and data[:1] == b"\1":
            raise GRPCError(Status.UNIMPLEMENTED, "compressed messages are not taken; send identity")
        return data


class _Connection(Connection):
    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> Stream:
        return _LimitedStream(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)


class _Handler(Handler):
    """Answers unknown methods as gRPC wants it: with a content type, else Go clients report Unknown."""

    def accept(self, stream: Stream, headers: Any, release_stream: Callable[[], Any]) -> None:
        path = dict(headers).get(":path")
        encoding = dict(headers).get("grpc-encoding", "identity")
        if path in self.mapping and encoding == "identity":
            super().accept(stream, headers, release_stream)
            return
        text = f"no method {path}" if path not in self.mapping else f"no compression {encoding}"
        self._tasks[stream] = self.loop.create_task(_refuse(stream, text, release_stream), name="rpc/refuse")

    def cancel(self, stream: Stream) -> None:
        if stream in self._tasks:
            super().cancel(stream)

    def running(self) -> list[asyncio.Task[None]]:
        return [task for task in self._tasks.values() if not task.done()]


async def _refuse(stream: Stream, text: str, release_stream: Callable[[], Any]) -> None:
    try:
        await stream.send_headers(
            [
                (":status", "200"),
                ("content-type", "application/grpc+proto"),
                ("grpc-status", str(Status.UNIMPLEMENTED.value)),
                ("grpc-message", text),
                ("grpc-accept-encoding", "identity"),
            ],
            end_stream=True,
        )
        if stream.closable:
            stream.reset_nowait()
    finally:
        release_stream()


class _Protocol(H2Protocol):
    """More streams than 100; a lost connection wakes those who wait to write; only root may connect."""

    def __init__(self, owner: _Server, handler: _Handler, config: Configuration, h2_config: Any) -> None:
        super().__init__(handler, config, h2_config)
        self._owner = owner

    def connection_made(self, transport: Any) -> None:
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            _, uid, _ = _PEERCRED.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            )
            if uid not in (0, os.geteuid()):
                log.warning("refused a connection of uid %d", uid)
                transport.abort()
                return
        super().connection_made(transport)
        h2 = self.connection._connection
        h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS})
        self.connection.__class__ = _Connection
        self.connection.flush()
        self._owner.protocols.add(self)

    def data_received(self, data: bytes) -> None:
        if hasattr(self, "processor"):
            super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._owner.protocols.discard(self)
        if not hasattr(self, "processor"):
            return
        streams = list(self.processor.streams.values())
        super().connection_lost(exc)
        self.connection.write_ready.set()
        for stream in streams:
            stream.window_updated.set()

    def goaway(self) -> None:
        """Tell the client to use another connection, and close this one."""
        if hasattr(self, "processor") and not self.connection.is_closing():
            self.connection._connection.close_connection()
            self.connection.flush()
            self.processor.close("the server ends")


class _Server(Server):
    def __init__(self, services: Collection[Any]) -> None:
        config = Configuration(http2_connection_window_size=WINDOW, http2_stream_window_size=WINDOW)
        super().__init__(services, codec=_Codec(), config=config)
        self.closing = False
        self.protocols: set[_Protocol] = set()
        self._mapping = {
            name: Method(
                guarded(name, method.func, lambda: self.closing), method.cardinality, method.request_type,
                method.reply_type,
            )
            for name, method in self._mapping.items()
        }  # fmt: skip

    def _protocol_factory(self) -> H2Protocol:
        self.__gc_step__()
        handler = _Handler(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        self._handlers.add(handler)
        return _Protocol(self, handler, self._config, self._h2_config)

    def running(self) -> list[asyncio.Task[None]]:
        return [task for handler in self._handlers for task in cast(_Handler, handler).running()]


class RpcServer:
    """gRPC services on a UNIX socket that only root may use."""

    def __init__(self, services: Sequence[Any]) -> None:
        self._server = _Server(services)
        self._path: Path | None = None

    async def listen(self, path: Path) -> None:
        """Raises FailedPrecondition when somebody listens there already."""
        sock = await asyncio.to_thread(_bind, path)
        self._path = path
        await self._server.start(sock=sock)

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve one connected socket (tests, and agents that accept by themselves)."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(cast(Any, partial(self._server._protocol_factory)), sock)

    async def close(self, seconds: float) -> None:
        """No new connections; running RPCs get `seconds`, then UNAVAILABLE; then GOAWAY and the end."""
        server = self._server
        if server._server is not None:
            server._server.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if running := server.running():
            await asyncio.wait(running, timeout=seconds)
        server.closing = True
        left = server.running()
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=5.0)
        for protocol in list(server.protocols):
            protocol.goaway()


def _bind(path: Path) -> socket.socket:
    """A listening socket, 0600 from its first moment; a stale file of a dead server is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
    if path.exists():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
            else:
                raise FailedPrecondition(f"something listens on {path} already")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(old)
    sock.listen(128)
    sock.setblocking(False)
    return sock
