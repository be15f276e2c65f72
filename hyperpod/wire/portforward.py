"""A port-forward's side of its client: pairs of SPDY streams, also inside a WebSocket, or WebSocket channels.

Sans-IO, as `remotecommand`: events say what to dial and what to write there; calls say what came from there.
Each forwarded connection has a number of its own. `receive` raises ProtocolError and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hyperpod.errors import InvalidArgument
from hyperpod.wire import spdy
from hyperpod.wire.channels import SPDY_WINDOW, Buffer, Channels, answer, spdy_events
from hyperpod.wire.upgrade import Transport
from hyperpod.wire.websocket import MessageCodec

MAX_CONNECTIONS = 512
"""Forwarded connections at once, of one session and of all of a pod."""
_MAX_TEXT = 1024
_MAX_EARLY, _MAX_ALL_EARLY = 64 * 1024, 1024 * 1024
"""Bytes kept for connections that are not complete: of one, and of all."""
_MAX_BINARY, _MAX_BASE64 = 128, 40
"""Ports, of two channels each: a number is one byte, or in base64 forms one ASCII character from "0" on."""


class Dial(NamedTuple):
    """A new connection: reach this port of the pod."""

    ident: int
    port: int


class Forward(NamedTuple):
    """Bytes for the port. Tell `consumed` when they are written."""

    ident: int
    data: bytes | memoryview


class ForwardEnded(NamedTuple):
    """The client sends nothing more on this connection; it still reads."""

    ident: int


class Dropped(NamedTuple):
    """The client has given the connection up: close it, send nothing."""

    ident: int


class ForwardLeft(NamedTuple):
    """The client has said goodbye: all connections are to be closed."""


ForwardEvent = Dial | Forward | ForwardEnded | Dropped | ForwardLeft


class PortForward(Protocol):
    """What every transport offers; unknown numbers are fine, their connections are over."""

    half_close: bool
    """Whether one direction of a connection can end before the other."""

    def start(self) -> list[ForwardEvent]:
        """To be asked once, before anything is received."""

    def receive(self, data: bytes) -> list[ForwardEvent]: ...

    def send(self, ident: int, data: Buffer) -> None:
        """At most `room` bytes from the port."""

    def room(self, ident: int) -> int: ...

    def end(self, ident: int) -> None:
        """The port sends nothing more."""

    def fail(self, ident: int, text: str) -> None:
        """The connection could not be made, or kept; it is over."""

    def broke(self, ident: int, text: str) -> None:
        """The port has reset the connection; it is over. `text` is for clients that cannot be told otherwise."""

    def close(self, ident: int) -> None:
        """Both directions have ended."""

    def consumed(self, ident: int, count: int) -> None:
        """So many bytes of Forward are written."""

    def expire(self) -> None:
        """Refuse connections that were already incomplete when this was last called."""

    def finish(self) -> None:
        """Goodbye."""

    def data_to_send(self) -> list[Buffer]: ...


def port_forward(transport: Transport, protocol: str, ports: tuple[int, ...]) -> PortForward:
    """`ports`: those of the CRI request, which only the WebSocket's own protocol uses."""
    if transport is Transport.SPDY:
        return SpdyForward()
    if transport is Transport.TUNNEL:
        return TunnelForward()
    return WebSocketForward(protocol, ports)


@dataclass
class _Pair:
    """Two streams of one request id; `ident` is the data stream's number once both are there."""

    request: str
    port: int
    data: int = 0
    error: int = 0
    old: bool = False
    early: bytearray = field(default_factory=bytearray)
    """What came on the data stream before its error stream did: clients open that one first, but need not."""
    early_end: bool = False


@dataclass
class SpdyForward:
    """A data and an error stream for each connection, joined by the header `requestid`."""

    half_close = True
    _connection: spdy.Connection = field(
        default_factory=lambda: spdy.Connection(
            spdy.Role.SERVER, limits=spdy.Limits(streams=2 * MAX_CONNECTIONS, window=SPDY_WINDOW)
        )
    )
    _pairs: dict[int, _Pair] = field(default_factory=dict)
    _waiting: dict[str, _Pair] = field(default_factory=dict)
    """Those of which one stream is there, by request; `_halves` has them by that stream."""
    _halves: dict[int, _Pair] = field(default_factory=dict)
    _held: int = 0
    """Bytes that have come early, of all."""

    def start(self) -> list[ForwardEvent]:
        return []

    def receive(self, data: bytes) -> list[ForwardEvent]:
        events: list[ForwardEvent] = []
        for event in spdy_events(self._connection, data):
            match event:
                case spdy.DataReceived(stream, payload):
                    self._data(stream, payload, events)
                case spdy.StreamOpened():
                    self._opened(event, events)
                case spdy.StreamEnded(stream):
                    self._tell(stream, ForwardEnded(stream), events)
                case spdy.StreamReset(stream):
                    self._reset(stream, events)
                case spdy.GoneAway():
                    events.append(ForwardLeft())
        return events

    def _opened(self, event: spdy.StreamOpened, events: list[ForwardEvent]) -> None:
        kind, text = spdy.find(event.headers, "streamtype"), spdy.find(event.headers, "port")
        port = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else 0
        # Old clients give no id: their data stream comes right after its error stream.
        implied = event.stream - 2 if kind == "data" else event.stream
        request = spdy.find(event.headers, "requestid") or f"#{implied}"
        pair = self._waiting.get(request) or _Pair(request, port)
        taken = pair.data if kind == "data" else pair.error
        if not 0 < port < 65536 or kind not in ("data", "error") or taken or pair.port != port:
            self._connection.reset(event.stream, spdy.ResetStatus.PROTOCOL_ERROR)
            return
        if not answer(self._connection, event.stream):
            self._forget(pair)
            self._end(pair.error)  # who has opened it waits for its end
            return
        if kind == "data":
            pair.data = event.stream
        else:
            pair.error = event.stream
        if not (pair.data and pair.error):
            self._waiting[request] = self._halves[event.stream] = pair
            return
        self._forget(pair)
        self._pairs[pair.data] = pair
        events.append(Dial(pair.data, pair.port))
        if pair.early:
            events.append(Forward(pair.data, bytes(pair.early)))
        if pair.early_end:
            events.append(ForwardEnded(pair.data))

    def _data(self, stream: int, payload: bytes | memoryview, events: list[ForwardEvent]) -> None:
        if stream in self._pairs:
            events.append(Forward(stream, payload))
        elif (half := self._halves.get(stream)) is not None and half.data == stream:
            half.early += payload
            self._held += len(payload)
            if len(half.early) > _MAX_EARLY or self._held > _MAX_ALL_EARLY:
                self._drop(half, "more came than can be kept for a connection without its error stream")
        else:
            self._connection.acknowledge(stream, len(payload))

    def _tell(self, stream: int, event: ForwardEvent, events: list[ForwardEvent]) -> None:
        if stream in self._pairs:
            events.append(event)
        elif (half := self._halves.get(stream)) is not None and half.data == stream:
            half.early_end = True

    def _reset(self, stream: int, events: list[ForwardEvent]) -> None:
        if (pair := self._pairs.pop(stream, None)) is not None:
            self._end(pair.error)
            events.append(Dropped(stream))
        elif (half := self._halves.get(stream)) is not None:
            self._forget(half)

    def _forget(self, half: _Pair) -> None:
        """It waits no more, or never did."""
        if self._waiting.pop(half.request, None) is not None:
            self._halves.pop(half.data, None)
            self._halves.pop(half.error, None)
            self._held -= len(half.early)

    def _drop(self, half: _Pair, text: str) -> None:
        self._forget(half)
        self._fail(half, text)

    def _fail(self, pair: _Pair, text: str) -> None:
        message = text[:_MAX_TEXT].encode(errors="replace")
        if self._connection.can_send(pair.error) and len(message) <= self._connection.window(pair.error):
            self._connection.send_data(pair.error, message)
        self._end(pair.error)
        self._connection.reset(pair.data)

    def _end(self, stream: int) -> None:
        if self._connection.can_send(stream):
            self._connection.end(stream)

    def send(self, ident: int, data: Buffer) -> None:
        if ident in self._pairs and self._connection.can_send(ident) and len(data):
            self._connection.send_data(ident, data)

    def room(self, ident: int) -> int:
        return self._connection.window(ident) if self._connection.can_send(ident) else 1 << 30

    def end(self, ident: int) -> None:
        if (pair := self._pairs.get(ident)) is not None:
            self._end(ident)
            # An older kubectl, which does not reset its half then, closes its side only after the error stream.
            self._end(pair.error)

    def fail(self, ident: int, text: str) -> None:
        if (pair := self._pairs.pop(ident, None)) is not None:
            self._fail(pair, text)

    def broke(self, ident: int, text: str) -> None:
        # Without a word, as from cri-streaming: kubectl gives the whole session up for a word on an error stream.
        if (pair := self._pairs.pop(ident, None)) is not None:
            self._connection.reset(pair.data)
            self._connection.reset(pair.error)

    def close(self, ident: int) -> None:
        if (pair := self._pairs.pop(ident, None)) is not None:
            self._end(pair.data)
            self._end(pair.error)

    def consumed(self, ident: int, count: int) -> None:
        self._connection.acknowledge(ident, count)

    def expire(self) -> None:
        for pair in list(self._waiting.values()):
            if pair.old:
                self._drop(pair, f"timed out waiting for the streams of request {pair.request}")
            pair.old = True

    def finish(self) -> None:
        for ident in list(self._pairs):
            self.close(ident)
        self._connection.close()

    def data_to_send(self) -> list[Buffer]:
        return self._connection.data_to_send()


class TunnelForward(SpdyForward):
    """SPDY's bytes as binary messages (`SPDY/3.1+portforward.k8s.io`); where they are cut means nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._codec = MessageCodec()

    def receive(self, data: bytes) -> list[ForwardEvent]:
        events: list[ForwardEvent] = []
        for piece in self._codec.receive(data):
            events += super().receive(piece.data)
        if self._codec.closed:
            events.append(ForwardLeft())
        return events

    def finish(self) -> None:
        super().finish()
        self._wrap()
        self._codec.close()

    def _wrap(self) -> None:
        if buffers := super().data_to_send():
            self._codec.message(buffers)

    def data_to_send(self) -> list[Buffer]:
        self._wrap()
        return self._codec.data_to_send()


class WebSocketForward:
    """Two channels for each port, data and error; every port is dialled once, at the start."""

    half_close = False

    def __init__(self, protocol: str, ports: tuple[int, ...]) -> None:
        """Raises InvalidArgument: more ports than the protocol has channels for."""
        if len(ports) > (_MAX_BASE64 if "base64" in protocol else _MAX_BINARY):
            raise InvalidArgument(f"{protocol} cannot carry {len(ports)} ports")
        self._ports = ports
        self._channels = Channels(protocol)
        self._open = set(range(len(ports)))

    def start(self) -> list[ForwardEvent]:
        for index, port in enumerate(self._ports):
            for channel in (2 * index, 2 * index + 1):
                self._channels.send(channel, port.to_bytes(2, "little"))
        return [Dial(index, port) for index, port in enumerate(self._ports)]

    def receive(self, data: bytes) -> list[ForwardEvent]:
        events: list[ForwardEvent] = [
            Forward(part.channel // 2, part.data)
            for part in self._channels.receive(data)
            if part.data and part.channel % 2 == 0 and part.channel // 2 in self._open
        ]
        if self._channels.codec.closed:
            events.append(ForwardLeft())
        return events

    def send(self, ident: int, data: Buffer) -> None:
        if ident in self._open and len(data):
            self._channels.send(2 * ident, data)

    def room(self, ident: int) -> int:
        return 1 << 30

    def end(self, ident: int) -> None:
        """The protocol has no half-close; the connection ends with the last port's."""

    def fail(self, ident: int, text: str) -> None:
        if ident in self._open:
            self._channels.send(2 * ident + 1, text[:_MAX_TEXT].encode(errors="replace"))
            self.close(ident)

    def broke(self, ident: int, text: str) -> None:
        self.fail(ident, text)

    def close(self, ident: int) -> None:
        self._open.discard(ident)
        if not self._open:
            self._channels.codec.close()

    def consumed(self, ident: int, count: int) -> None:
        """Nothing: the only window is TCP's."""

    def expire(self) -> None:
        """Nothing: all connections are there from the start."""

    def finish(self) -> None:
        self._channels.codec.close()

    def data_to_send(self) -> list[Buffer]:
        return self._channels.codec.data_to_send()
