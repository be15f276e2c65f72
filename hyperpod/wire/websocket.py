"""WebSocket messages after the handshake: pieces in, frames out, pings and the closing answered.

wsproto reads and answers, but for the payloads of binary messages (`wsframes`), whose mask is taken off by an
extension module: wsproto does that in Python. Messages are passed on as they come, so their length does not matter;
no more is kept than a frame's header and what was fed last.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from typing import NamedTuple

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import ProtocolError as WsprotoError

from hyperpod.errors import ProtocolError
from hyperpod.wire.wsframes import FrameSplitter, Masked

try:
    from websockets.speedups import apply_mask
except ImportError:  # built without its extension module: the same in Python
    from websockets.utils import apply_mask

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
        self._frames = FrameSplitter()
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
            for part in self._frames.feed(data):
                if isinstance(part, Masked):
                    pieces.append(self._piece(apply_mask(part.data, part.mask), last=part.last))
                elif not self._by_wsproto(part, pieces):
                    break
        except (WsprotoError, ProtocolError) as exc:
            self.closed = True
            self.close(CloseReason.PROTOCOL_ERROR)
            raise ProtocolError(f"WebSocket: {exc}") from exc
        return pieces

    def _by_wsproto(self, data: memoryview, pieces: list[Piece]) -> bool:
        """False: the peer has said goodbye. Raises ProtocolError."""
        self._connection.receive_data(bytes(data))
        for event in self._connection.events():
            if isinstance(event, TextMessage):
                pieces.append(self._piece(event.data.encode(), last=event.message_finished))
            elif isinstance(event, Ping):
                if self._connection.state is ConnectionState.OPEN:  # behind our goodbye nothing may go
                    self._out.append(self._connection.send(event.response()))
            elif isinstance(event, CloseConnection):
                self.closed = True
                if self._connection.state is ConnectionState.OPEN:  # wsproto's word for "cannot be parsed"
                    self.close(CloseReason(event.code))
                    raise ProtocolError(event.reason or "it cannot be parsed")
                if self._connection.state is ConnectionState.REMOTE_CLOSING:
                    self._out.append(self._connection.send(event.response()))
                return False
        return True

    def _piece(self, data: bytes, *, last: bool) -> Piece:
        first, self._begun = not self._begun, not last
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
