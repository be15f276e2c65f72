"""WebSocket messages after the handshake, on wsproto: pieces in, frames out, pings and the closing answered.

Messages are passed on as they come, so their length does not matter; wsproto keeps no more than a frame's header
and what it was fed last.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from typing import NamedTuple

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import ProtocolError as WsprotoError

from hyperpod.errors import ProtocolError

Buffer = bytes | bytearray | memoryview

_BINARY = 0x82
"""FIN, and the opcode."""
_SHORT, _MEDIUM, _LONG = struct.Struct("!BB"), struct.Struct("!BBH"), struct.Struct("!BBQ")


class Piece(NamedTuple):
    """A part of a message; `first` and `last` say which."""

    data: bytes
    first: bool
    last: bool


class MessageCodec:
    """The server's side of an open WebSocket connection."""

    def __init__(self) -> None:
        self._connection = Connection(ConnectionType.SERVER)
        self._out: list[Buffer] = []
        self._begun = False
        self.closed = False
        """The peer has said goodbye, or been told to go: nothing comes or goes any more."""

    def receive(self, data: bytes) -> list[Piece]:
        """Raises ProtocolError, with a closing frame queued that says so."""
        if self.closed:
            return []
        pieces: list[Piece] = []
        try:
            self._connection.receive_data(data)
            for event in self._connection.events():
                if isinstance(event, BytesMessage | TextMessage):
                    pieces.append(self._piece(event))
                elif isinstance(event, Ping):
                    self._out.append(self._connection.send(event.response()))
                elif isinstance(event, CloseConnection):
                    self.closed = True
                    if (
                        self._connection.state is ConnectionState.OPEN
                    ):  # wsproto's word for "cannot be parsed"
                        self.close(CloseReason(event.code))
                        raise ProtocolError(f"WebSocket: {event.reason}")
                    if self._connection.state is ConnectionState.REMOTE_CLOSING:
                        self._out.append(self._connection.send(event.response()))
                    break
        except WsprotoError as exc:
            self.close(CloseReason.PROTOCOL_ERROR)
            self.closed = True
            raise ProtocolError(f"WebSocket: {exc}") from exc
        return pieces

    def _piece(self, event: BytesMessage | TextMessage) -> Piece:
        first, last = not self._begun, event.message_finished
        self._begun = not last
        data = event.data.encode() if isinstance(event, TextMessage) else bytes(event.data)
        return Piece(data, first, last)

    def message(self, parts: Sequence[Buffer]) -> None:
        """Queue one binary message; dropped when the connection is closing. A server does not mask, so
        nothing needs to be copied, which wsproto does three times."""
        if self._connection.state is ConnectionState.OPEN:
            self._out += (_header(sum(map(len, parts))), *parts)

    def text(self, data: bytes) -> None:
        """Queue one text message of ASCII."""
        if self._connection.state is ConnectionState.OPEN:
            self._out.append(self._connection.send(TextMessage(data=data.decode("ascii"))))

    def close(self, code: CloseReason = CloseReason.NORMAL_CLOSURE) -> None:
        """Queue the goodbye, once."""
        if self._connection.state in (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING):
            self._out.append(self._connection.send(CloseConnection(code=code)))

    def data_to_send(self) -> list[Buffer]:
        out, self._out = self._out, []
        return out


def _header(length: int) -> bytes:
    """Of a whole binary message that is not masked (RFC 6455, section 5.2)."""
    if length < 126:
        return _SHORT.pack(_BINARY, length)
    return _MEDIUM.pack(_BINARY, 126, length) if length < 65536 else _LONG.pack(_BINARY, 127, length)


class Base64Decoder:
    """Base64 that comes in pieces: one message after the other."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """What is decoded so far. Raises ProtocolError."""
        data = self._rest + data
        whole = len(data) - len(data) % 4
        self._rest = data[whole:]
        if last and self._rest:
            raise ProtocolError("WebSocket: base64 without its padding")
        try:
            return base64.b64decode(data[:whole], validate=True)
        except (binascii.Error, ValueError) as exc:
            raise ProtocolError("WebSocket: message is not base64") from exc
