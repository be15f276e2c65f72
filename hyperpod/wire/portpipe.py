"""The `port` stream of a stdio connection: one TCP connection to a port of the pod. Sans-IO.

    host     OPEN {"stream": "port", "port"}
    agent    OPENED when it is connected, or ERROR(text)
    both     DATA(offset) ... EOF(total); the agent ERROR(text) when the connection breaks

There are no acknowledgements: each connection has its own back-pressure. The framing tells an end from a break.
With a HANDOVER the TCP socket itself is the host's, and this connection over.
"""

from __future__ import annotations

from hyperpod.errors import ProtocolError
from hyperpod.wire.stdio import (
    Frame,
    FrameDecoder,
    FrameType,
    Open,
    StreamRefused,
    check_handover,
    encode_data,
    encode_eof,
    encode_open,
)

Buffer = bytes | bytearray | memoryview


class PortEnd:
    """What both sides do alike: offsets both ways."""

    def __init__(self) -> None:
        self._sent = self._received = 0
        self.ended = False
        """The other side has sent its EOF."""
        self.finished = False
        """`finish` was called."""

    def data(self, data: bytes | memoryview) -> list[bytes | memoryview]:
        """Buffers to send."""
        out = encode_data(self._sent, data)
        self._sent += len(data)
        return out

    def finish(self) -> bytes:
        """Nothing more follows."""
        self.finished = True
        return encode_eof(self._sent)

    def take(self, frame: Frame) -> bytes | memoryview:
        """The payload of DATA; empty for EOF, see `ended`. Raises ProtocolError."""
        if frame.type not in (FrameType.DATA, FrameType.EOF) or self.ended:
            raise ProtocolError(f"stdio: {frame.type.name} {'after EOF' if self.ended else 'of a port'}")
        if frame.offset != self._received:
            raise ProtocolError(f"stdio: {frame.type.name} at {frame.offset}, due was {self._received}")
        if frame.type is FrameType.EOF:
            self.ended = True
            return b""
        self._received += len(frame.payload)
        return frame.payload


class HostPort(PortEnd):
    """The host's side."""

    def __init__(self, port: int, *, direct: bool = False) -> None:
        super().__init__()
        self._request, self._decoder = Open("", "port", port=port, direct=direct), FrameDecoder()
        self.opened = self.handed_over = False
        self._refused: StreamRefused | None = None

    def start(self) -> bytes:
        return encode_open(self._request)

    def feed(self, data: bytes) -> list[bytes | memoryview]:
        """Payloads; look at `opened`, `handed_over` and `ended` too. Raises ProtocolError, StreamRefused: when all
        payloads before it have been had, so feed nothing once more before waiting."""
        out: list[bytes | memoryview] = []
        if self._refused is not None:
            raise self._refused
        for frame in self._decoder.feed(data):
            if frame.type is FrameType.ERROR:
                self._refused = StreamRefused(bytes(frame.payload).decode(errors="replace"))
                if out:
                    return out
                raise self._refused
            if not self.opened:
                if frame.type is not FrameType.OPENED:
                    raise ProtocolError(f"stdio: {frame.type.name} where OPENED was due")
                self.opened = True
            elif frame.type is FrameType.HANDOVER and not self.handed_over:
                check_handover(self._request, frame, self._received)
                self.handed_over = True
            elif payload := self.take(frame):
                out.append(payload)
        return out
