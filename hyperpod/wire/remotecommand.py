"""An exec's or attach's side of its client: streams of SPDY, or channels of a WebSocket (v1 to v5). Sans-IO.

    session = remote_command(Transport.SPDY, "v4.channel.k8s.io", Wanted(stdin=True, stdout=True))
    for event in session.receive(data): ...
    session.send(Channel.STDOUT, payload)
    session.finish(Outcome(exit_code=0))
    write(session.data_to_send())

Begin once `Ready` has come. `receive` raises ProtocolError and nothing else; what is queued then is to be sent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from hyperpod.errors import ProtocolError
from hyperpod.wire import spdy
from hyperpod.wire.channels import SPDY_WINDOW, Buffer, Channels, Part, answer, spdy_events
from hyperpod.wire.outcome import Outcome, as_status, as_text
from hyperpod.wire.upgrade import Transport

_CLOSE_SIGNAL = 255
_VISIBLE = re.compile(r"\S")
_MAX_RESIZE = 1024
"""Bytes of one size; no client writes more than 40."""


class Channel(IntEnum):
    """Numbers of the WebSocket protocol; the first three are the file descriptors."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4


_NAMES = {channel.name.lower(): channel for channel in Channel}


@dataclass(frozen=True)
class Wanted:
    """The streams that the CRI request asked for."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False

    def channels(self, *, resize: bool) -> set[Channel]:
        flags = {Channel.STDIN: self.stdin, Channel.STDOUT: self.stdout, Channel.STDERR: self.stderr,
                 Channel.ERROR: True, Channel.RESIZE: self.tty and resize}  # fmt: skip
        return {channel for channel, wanted in flags.items() if wanted}


class Ready(NamedTuple):
    """Every stream that was asked for is there."""


class Stdin(NamedTuple):
    """Tell `consumed` when it is written."""

    data: bytes | memoryview


class StdinEnded(NamedTuple):
    """The client sends no more input; it still reads."""


class Resized(NamedTuple):
    rows: int
    columns: int


class Left(NamedTuple):
    """The client has said goodbye: nothing that is sent will be read."""


CommandEvent = Ready | Stdin | StdinEnded | Resized | Left


class RemoteCommand(Protocol):
    """What both transports offer."""

    def receive(self, data: bytes) -> list[CommandEvent]: ...

    def send(self, channel: Channel, data: Buffer) -> None:
        """At most `room` bytes. Dropped when the client does not have the channel (any more)."""

    def room(self, channel: Channel) -> int:
        """Bytes that the client takes now; data for a channel that it has not fits always."""

    def end(self, channel: Channel) -> None:
        """Nothing more will come on it."""

    def consumed(self, count: int) -> None:
        """So many bytes of Stdin are written."""

    def finish(self, outcome: Outcome) -> None:
        """The last that is sent: how it ended, and goodbye."""

    def data_to_send(self) -> list[Buffer]: ...


def remote_command(transport: Transport, protocol: str, wanted: Wanted) -> RemoteCommand:
    """`protocol` as negotiated."""
    if transport is Transport.SPDY:
        return SpdyCommand(protocol, wanted)
    return WebSocketCommand(protocol, wanted)


class Sizes:
    """Terminal sizes out of a stream of JSON objects; after nonsense there are no more."""

    def __init__(self) -> None:
        self._text = ""
        self._decoder = json.JSONDecoder()
        self._broken = False

    def feed(self, data: bytes | memoryview) -> list[Resized]:
        if self._broken:
            return []
        sizes: list[Resized] = []
        text, position = self._text + bytes(data).decode("latin-1"), 0
        while (start := _first_visible(text, position)) < len(text):
            try:
                value, end = self._decoder.raw_decode(text, start)
            except (ValueError, RecursionError):
                self._broken = len(text) - start > _MAX_RESIZE
                break
            position = end
            if (size := _size(value)) is not None:
                sizes.append(size)
        self._text = "" if self._broken else text[start:]
        return sizes


def _first_visible(text: str, position: int) -> int:
    """Where the next thing that is no white space is, the end if there is none."""
    match = _VISIBLE.search(text, position)
    return match.start() if match else len(text)


def _size(value: object) -> Resized | None:
    if not isinstance(value, dict):
        return None
    lower = {str(key).lower(): item for key, item in value.items()}
    rows, columns = lower.get("height"), lower.get("width")
    if type(rows) is not int or type(columns) is not int or not (0 < rows < 65536 and 0 < columns < 65536):
        return None
    return Resized(rows, columns)


class SpdyCommand:
    """Each channel is a stream that the client opens, named by its header `streamtype`."""

    def __init__(self, protocol: str, wanted: Wanted) -> None:
        self._version = _version(protocol)
        self._missing = wanted.channels(resize=self._version >= 3)
        self._connection = spdy.Connection(
            spdy.Role.SERVER, limits=spdy.Limits(streams=16, window=SPDY_WINDOW)
        )
        self._streams: dict[Channel, int] = {}
        self._channels: dict[int, Channel] = {}
        self._sizes = Sizes()

    def receive(self, data: bytes) -> list[CommandEvent]:
        events: list[CommandEvent] = []
        for event in spdy_events(self._connection, data):
            match event:
                case spdy.DataReceived(stream, payload):
                    self._data(stream, payload, events)
                case spdy.StreamOpened():
                    self._opened(event, events)
                case spdy.StreamEnded(stream) | spdy.StreamReset(stream):
                    if self._channels.get(stream) is Channel.STDIN:
                        events.append(StdinEnded())
                case spdy.GoneAway():
                    events.append(Left())
        return events

    def _opened(self, event: spdy.StreamOpened, events: list[CommandEvent]) -> None:
        channel = _NAMES.get(spdy.find(event.headers, "streamtype"))
        if channel not in self._missing:
            self._connection.reset(event.stream, spdy.ResetStatus.REFUSED_STREAM)
            return
        if not answer(self._connection, event.stream, fin=channel is Channel.STDIN and self._version == 1):
            return
        self._missing.discard(channel)
        self._streams[channel], self._channels[event.stream] = event.stream, channel
        if not self._missing:
            events.append(Ready())

    def _data(self, stream: int, payload: bytes | memoryview, events: list[CommandEvent]) -> None:
        channel = self._channels.get(stream)
        if channel is Channel.STDIN:
            events.append(Stdin(payload))
            return
        if channel is Channel.RESIZE:
            events += self._sizes.feed(payload)
        self._connection.acknowledge(stream, len(payload))

    def send(self, channel: Channel, data: Buffer) -> None:
        stream = self._streams.get(channel, 0)
        if self._connection.can_send(stream) and len(data):
            self._connection.send_data(stream, data)

    def room(self, channel: Channel) -> int:
        stream = self._streams.get(channel, 0)
        return self._connection.window(stream) if self._connection.can_send(stream) else 1 << 30

    def end(self, channel: Channel) -> None:
        stream = self._streams.get(channel, 0)
        if self._connection.can_send(stream):
            self._connection.end(stream)

    def consumed(self, count: int) -> None:
        self._connection.acknowledge(self._streams.get(Channel.STDIN, 0), count)

    def finish(self, outcome: Outcome) -> None:
        message = as_status(outcome) if self._version >= 4 else as_text(outcome)
        # Only a client that keeps its window shut does not hear how it ended.
        if len(message) <= self.room(Channel.ERROR):
            self.send(Channel.ERROR, message)
        for channel in (Channel.STDOUT, Channel.STDERR, Channel.ERROR, Channel.STDIN, Channel.RESIZE):
            self.end(channel)
        self._connection.close()

    def data_to_send(self) -> list[Buffer]:
        return self._connection.data_to_send()


def _version(protocol: str) -> int:
    """1 for no version, as for no protocol at all."""
    return int(protocol[1]) if protocol[:1] == "v" and protocol[1:2].isdigit() else 1


class WebSocketCommand:
    """Each message begins with its channel's number, in base64 forms with its digit."""

    def __init__(self, protocol: str, wanted: Wanted) -> None:
        self._version = _version(protocol)
        self._wanted = wanted
        self._allowed = wanted.channels(resize=True)
        self._channels = Channels(protocol)
        self._signal = bytearray()
        self._sizes = Sizes()
        self._started = self._stdin_over = False
        # An empty message says that the session stands; clients wait for it.
        first = Channel.STDOUT if wanted.stdout else Channel.STDERR if wanted.stderr else Channel.ERROR
        self._channels.send(first, b"")

    def receive(self, data: bytes) -> list[CommandEvent]:
        events: list[CommandEvent] = []
        if not self._started:
            self._started = True
            events.append(Ready())
        for part in self._channels.receive(data):
            self._part(part, events)
        if self._channels.codec.closed:
            events.append(Left())
        return events

    def _part(self, part: Part, events: list[CommandEvent]) -> None:
        if part.first:
            self._signal.clear()
        if self._version >= 5 and part.channel == _CLOSE_SIGNAL:
            self._signal += part.data[:2]
            if part.last:
                self._close_signal(events)
        elif part.data:
            self._data(part, events)

    def _close_signal(self, events: list[CommandEvent]) -> None:
        if len(self._signal) != 1 or self._signal[0] > Channel.RESIZE:
            raise ProtocolError("WebSocket: close signal for no channel")
        if self._signal[0] == Channel.STDIN and not self._stdin_over:
            self._stdin_over = True
            events.append(StdinEnded())

    def _data(self, part: Part, events: list[CommandEvent]) -> None:
        if part.channel == Channel.STDIN and self._wanted.stdin and not self._stdin_over:
            events.append(Stdin(part.data))
        elif part.channel == Channel.RESIZE and self._wanted.tty:
            events += self._sizes.feed(part.data)

    def send(self, channel: Channel, data: Buffer) -> None:
        if channel in self._allowed and len(data):
            self._channels.send(channel, data)

    def room(self, channel: Channel) -> int:
        return 1 << 30

    def end(self, channel: Channel) -> None:
        """Nothing: no client expects a signal from the server, all streams end with the connection."""

    def consumed(self, count: int) -> None:
        """Nothing: the only window is TCP's."""

    def finish(self, outcome: Outcome) -> None:
        message = as_status(outcome) if self._version >= 4 else as_text(outcome)
        if message:
            self._channels.send(Channel.ERROR, message)
        self._channels.codec.close()

    def data_to_send(self) -> list[Buffer]:
        return self._channels.codec.data_to_send()
