"""grpclib's connection, stream and handler with the defects of 0.4.9 mended; each has a test.

Settings: more than 100 streams. Sizes: a limit on inbound messages. Cancellation: once per call, and not lost
when the connection goes while writing is paused. Refusals: as gRPC wants them. End: GOAWAY, then a drain.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline, encode_grpc_message
from grpclib.protocol import Connection, H2Protocol, Stream
from grpclib.server import Handler
from h2.events import UnknownFrameReceived
from h2.exceptions import StreamClosedError
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from hyperpod.logs import printable

log = logging.getLogger(__name__)

MESSAGE_LIMIT = 16 * 1024 * 1024
"""Bytes of one request, as containerd's and the kubelet's limit."""

MAX_STREAMS = 4096
"""Concurrent RPCs of one connection; grpclib's 100 let a hundred slow calls starve Version."""

LAST_STREAM = 2**31 - 1
"""In a first GOAWAY: all streams so far are served, none is to follow (RFC 9113, 6.8)."""

_PEERCRED = struct.Struct("3i")


@dataclass
class Life:
    """What the connections of one server share."""

    draining: bool = False
    """No further calls are taken."""
    closing: bool = False
    """The calls that are left are being cancelled."""
    protocols: set[RpcProtocol] = field(default_factory=set)


class _Stream(Stream):
    """Refuses messages over the limit before a byte of them is kept, and compressed ones with a reason."""

    _prefix_next = True
    """grpclib reads a prefix of 5 bytes (flag, length), then the message, by turns."""

    async def recv_data(self, size: int) -> bytes:
        is_prefix, self._prefix_next = self._prefix_next, not self._prefix_next
        if size > MESSAGE_LIMIT:
            raise GRPCError(
                Status.RESOURCE_EXHAUSTED, f"the request has {size} bytes, at most {MESSAGE_LIMIT} are taken"
            )
        try:
            data = await super().recv_data(size)
        except AssertionError as exc:  # grpclib's way to say it
            raise GRPCError(Status.INVALID_ARGUMENT, "the request ends within its message") from exc
        if len(data) < size:
            raise GRPCError(Status.INVALID_ARGUMENT, "the request has no message")
        if is_prefix and data[0]:
            raise GRPCError(Status.UNIMPLEMENTED, "compressed messages are not taken; send identity")
        return data

    def __terminated__(self, reason: str) -> None:
        # After the deadline's cancellation a second one would hit the handler's clean-up.
        if self.wrapper is None or not self.wrapper.cancelled:
            super().__terminated__(reason)


class _Connection(Connection):
    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> Stream:
        return _Stream(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)


class RpcHandler(Handler):
    """Starts and cancels the calls of one connection."""

    def __init__(self, life: Life, *args: Any) -> None:
        super().__init__(*args)
        self._life = life

    def accept(self, stream: Stream, headers: Any, release_stream: Callable[[], Any]) -> None:
        if (refusal := self._refusal(headers)) is None:
            super().accept(stream, headers, release_stream)
            return
        answer = _refuse(stream, *refusal, release_stream)
        self._tasks[stream] = self.loop.create_task(answer, name="rpc/refuse")

    def _refusal(self, headers: Any) -> tuple[Status, str] | None:
        """Why a call is not even begun. grpclib's own answers lack a content type: Go reports Unknown."""
        values = dict(headers)
        if self._life.draining:
            return Status.UNAVAILABLE, "the runtime is shutting down; try again"
        if (path := values.get(":path")) not in self.mapping:
            return Status.UNIMPLEMENTED, f"no method {printable(path or '', 200)}"
        if (encoding := values.get("grpc-encoding", "identity")) != "identity":
            return Status.UNIMPLEMENTED, f"no compression {printable(encoding, 50)}; send identity"
        try:
            Deadline.from_headers(headers)
        except ValueError:
            return Status.INVALID_ARGUMENT, "the header grpc-timeout is not as gRPC has it"
        return None

    def cancel(self, stream: Stream) -> None:
        if (task := self._tasks.pop(stream, None)) is not None:
            _cancel_once(task)
            self._cancelled.add(task)

    def close(self) -> None:
        for task in self._tasks.values():
            _cancel_once(task)
        self._cancelled.update(self._tasks.values())
        self.closing = True

    def running(self) -> list[asyncio.Task[None]]:
        """Calls that have not ended, the cancelled ones that still clean up included."""
        return [task for task in {*self._tasks.values(), *self._cancelled} if not task.done()]


def _cancel_once(task: asyncio.Task[None]) -> None:
    """A second cancellation would interrupt the clean-up that the first one began."""
    if not task.cancelling():
        task.cancel()


async def _refuse(stream: Stream, status: Status, text: str, release_stream: Callable[[], Any]) -> None:
    headers = [
        (":status", "200"),
        ("content-type", "application/grpc+proto"),
        ("grpc-accept-encoding", "identity"),
        ("grpc-status", str(status.value)),
        ("grpc-message", encode_grpc_message(text)),
    ]
    try:
        await stream.send_headers(headers, end_stream=True)
        if stream.closable:
            stream.reset_nowait()
    except StreamClosedError:
        log.debug("a refused call was given up by its client")
    finally:
        release_stream()


class RpcProtocol(H2Protocol):
    """One connection. On a UNIX socket only root, and the daemon's own uid, may connect."""

    def __init__(self, life: Life, handler: RpcHandler, config: Configuration, h2_config: Any) -> None:
        super().__init__(handler, config, h2_config)
        self._life = life

    def connection_made(self, transport: Any) -> None:
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            _, uid, _ = _PEERCRED.unpack(credentials)
            if uid not in (0, os.geteuid()):
                log.warning("refused a connection of uid %d", uid)
                transport.abort()
                return
        super().connection_made(transport)
        self.connection._connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS})
        self.connection.__class__ = _Connection
        self.connection.flush()
        self.processor.processors[UnknownFrameReceived] = lambda _: None  # RFC 9113, 5.5: to be ignored
        self._life.protocols.add(self)

    def data_received(self, data: bytes) -> None:
        if not hasattr(self, "processor"):
            return
        try:
            super().data_received(data)
        except UnicodeDecodeError:  # a header that is not ASCII
            log.warning("closing a connection: a header is not ASCII")
            self.processor.close("Protocol error")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._life.protocols.discard(self)
        if not hasattr(self, "processor"):
            return
        super().connection_lost(exc)
        # Calls that end their streams wait for this, and nobody else would wake them.
        self.connection.write_ready.set()

    def announce_end(self) -> None:
        """Tell the client to make no further calls here."""
        if not self.connection.is_closing():
            self.connection._transport.write(GoAwayFrame(0, last_stream_id=LAST_STREAM).serialize())

    def end(self) -> None:
        """Close; what is written already still goes out."""
        if not self.connection.is_closing():
            self.connection._connection.close_connection()
            self.connection.flush()
            self.processor.close("the server ends")
