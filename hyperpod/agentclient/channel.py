"""A grpclib channel over one already open connection, with bounds on what the other side may send.

grpclib has no inbound limit and takes no socket (facts of both in ARCHITECTURE.md), hence the overrides.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, cast

from grpclib.client import Channel, Handler, Stream
from grpclib.config import Configuration
from grpclib.const import Cardinality
from grpclib.encoding.base import CodecBase
from grpclib.metadata import Deadline
from grpclib.protocol import H2Protocol
from multidict import MultiDict

from hyperpod.agentclient.protocol import AgentProtocol
from hyperpod.agentclient.wakeup import CallWrapper, DeadlineCallWrapper
from hyperpod.errors import ConnectionLost, InvalidArgument, ProtocolError, ResourceExhausted
from hyperpod.rpc import strict
from hyperpod.rpc.encode import encode

MAX_MESSAGE = 64 * 1024
"""Bytes of one message from an agent."""

MAX_FIELDS = 8192
"""Fields of one message, nested ones included: a field costs 2 bytes to send and 3 us to decode. The biggest
honest message, a list of 64 KiB, has 6,000."""

_STREAM_WINDOW, _CONNECTION_WINDOW = 128 * 1024, 512 * 1024


class BoundedCodec(CodecBase):
    """betterproto2 messages; what comes in is counted before it is decoded."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return encode(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        """Raises ProtocolError for what is no message of this type, or has too many fields."""
        try:
            strict.check(data, message_type, MAX_FIELDS)
        except (InvalidArgument, ResourceExhausted) as exc:
            raise ProtocolError(f"agent message: {exc}") from exc
        return message_type.parse(data)


class _BoundedStream(Stream[Any, Any]):
    async def __aenter__(self) -> _BoundedStream:
        if self._deadline is None:
            self._wrapper = CallWrapper()
        else:
            self._wrapper = DeadlineCallWrapper()
            self._wrapper_ctx = self._wrapper.start(self._deadline)
            self._wrapper_ctx.__enter__()
        return self

    async def recv_message(self) -> Any:
        """As grpclib's, but the length is looked at before anything is read."""
        if not self._recv_initial_metadata_done:
            await self.recv_initial_metadata()
        assert self._wrapper is not None
        with self._wrapper:
            meta = await self._stream.recv_data(5)
            if not meta:
                return None
            compressed, length = struct.unpack(">BI", meta)
            if compressed or length > MAX_MESSAGE:
                raise ProtocolError(
                    f"agent message: {length} bytes, flag {compressed}; {MAX_MESSAGE} are allowed"
                )
            data = await self._stream.recv_data(length)
            if len(data) != length:
                raise ProtocolError("agent message: truncated")
            self._messages_received += 1
            self._stream.connection.messages_received += 1
            self._stream.connection.last_message_received = time.monotonic()
            return self._codec.decode(data, self._recv_type)


class AgentChannel(Channel):
    """One connection, made by `start`; when it is lost every call raises ConnectionLost."""

    def __init__(self) -> None:
        super().__init__(
            codec=BoundedCodec(),
            config=Configuration(
                http2_connection_window_size=_CONNECTION_WINDOW, http2_stream_window_size=_STREAM_WINDOW
            ),
        )

    async def start(self, sock: socket.socket, trailing: bytes) -> None:
        """Speak HTTP/2 on `sock`, of which `trailing` was read already. Takes over the socket."""
        loop = asyncio.get_running_loop()
        try:
            _, protocol = await loop.create_connection(self._protocol_factory, sock=sock)
        except BaseException:
            sock.close()
            raise
        self._protocol = protocol
        if trailing:
            protocol.data_received(trailing)

    def close(self) -> None:
        """At once: what the peer does not read would otherwise keep the socket open for ever."""
        protocol = self._protocol
        super().close()
        if isinstance(protocol, AgentProtocol):
            protocol.abort()

    def _protocol_factory(self) -> H2Protocol:
        return AgentProtocol(Handler(), self._config, self._h2_config)

    async def _create_connection(self) -> H2Protocol:
        raise ConnectionLost("the connection to the agent is lost")

    def request(
        self,
        name: str,
        cardinality: Cardinality,
        request_type: Any,
        reply_type: Any,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Mapping[str, str | bytes] | Any = None,
    ) -> Stream[Any, Any]:
        """As grpclib's, with the bounded stream."""
        if timeout is not None:
            deadline = Deadline.from_timeout(timeout)
        return _BoundedStream(
            self,
            name,
            cast(Any, MultiDict(metadata or ())),
            cardinality,
            request_type,
            reply_type,
            codec=self._codec,
            status_details_codec=None,
            dispatch=self.__dispatch__,
            deadline=deadline,
        )
