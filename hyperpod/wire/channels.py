"""What a remote command and a port-forward read alike: the events of SPDY, and the channels of a WebSocket."""

from __future__ import annotations

import base64
from typing import NamedTuple

from hyperpod.errors import ProtocolError
from hyperpod.wire import spdy
from hyperpod.wire.websocket import Base64Decoder, MessageCodec

Buffer = bytes | bytearray | memoryview

SPDY_WINDOW = 512 * 1024
"""Of what a client sends: with the protocol's own 64 KiB each 32 KiB would cost both sides two control frames."""


def spdy_events(connection: spdy.Connection, data: bytes) -> list[spdy.Event]:
    """Raises ProtocolError, and nothing else."""
    try:
        return connection.receive_data(data)
    except spdy.RemoteProtocolError as exc:
        raise ProtocolError(f"SPDY: {exc}") from exc


def answer(connection: spdy.Connection, stream: int, *, fin: bool = False) -> bool:
    """Reply to a stream that the client has opened. False: it takes no reply, being reset in the bytes behind
    already, or unidirectional; then it is gone."""
    if connection.must_reply(stream):
        connection.reply(stream, fin=fin)
        return True
    connection.reset(stream, spdy.ResetStatus.PROTOCOL_ERROR)
    return False


class Part(NamedTuple):
    """Of a message; `channel` is -1 while nothing of it has come."""

    channel: int
    data: bytes | memoryview
    first: bool
    last: bool


class Channels:
    """Messages that begin with their channel's number, in base64 forms with its digit."""

    def __init__(self, protocol: str) -> None:
        self.codec = MessageCodec()
        self._base64 = "base64" in protocol
        self._decoder = Base64Decoder()
        self._channel = -1  # of the message that is coming

    def receive(self, data: bytes) -> list[Part]:
        """Raises ProtocolError."""
        parts = []
        for piece in self.codec.receive(data):
            payload: bytes | memoryview = memoryview(piece.data)
            if piece.first:
                self._channel = -1
            if self._channel < 0 and payload:
                self._channel = payload[0] - ord("0") if self._base64 else payload[0]
                payload = payload[1:]
            if self._base64:
                payload = self._decoder.feed(bytes(payload), last=piece.last)
            parts.append(Part(self._channel, payload, piece.first, piece.last))
        return parts

    def send(self, channel: int, data: Buffer) -> None:
        """Queue one message."""
        if self._base64:
            self.codec.text(bytes((ord("0") + channel,)) + base64.b64encode(data))
        else:
            self.codec.message((bytes((channel,)), data))
