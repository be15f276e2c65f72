"""A SPDY/3.1 session without input or output: bytes in, events out; calls in, buffers out.

    connection = Connection(Role.SERVER)
    for event in connection.receive_data(data): ...
    connection.reply(stream, ())
    connection.send_data(stream, payload)
    transport.writelines(connection.data_to_send())

Payloads are not copied: `DataReceived.data` points into what was fed, `data_to_send` holds what was given to
`send_data`. A DATA frame that has not come whole is passed on as far as it has: nothing but control frames is
kept, and those are bounded by `Limits`, as is what header blocks expand to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from hyperpod.wire.spdy import frames
from hyperpod.wire.spdy.control import (
    ControlDecoder,
    GoawayFrame,
    HeaderFrame,
    PingFrame,
    ResetFrame,
    SettingsFrame,
    WindowFrame,
)
from hyperpod.wire.spdy.errors import GoAwayStatus, LocalProtocolError, RemoteProtocolError, ResetStatus
from hyperpod.wire.spdy.events import (
    DataReceived,
    Event,
    GoneAway,
    HeadersReceived,
    PingAnswered,
    SettingsReceived,
    StreamEnded,
    StreamOpened,
    StreamReplied,
    StreamReset,
    WindowOpened,
)
from hyperpod.wire.spdy.frames import FLAG_FIN, FLAG_UNIDIRECTIONAL, HEADER, FrameType, Setting
from hyperpod.wire.spdy.headers import HeaderCompressor, Headers, InvalidHeaders
from hyperpod.wire.spdy.states import FINAL, Half, NotAllowed, Sends, step
from hyperpod.wire.spdy.windows import FlowControl, ReceiveWindow, SendWindow

Buffer = bytes | bytearray | memoryview

_DATA_PIECE = 1024 * 1024
"""Bytes in one DATA frame: far below what fits, so that no stream holds the connection for long."""
_UNLIMITED = frames.MAX_WINDOW


class Role(Enum):
    CLIENT = auto()
    """Opens streams with odd numbers."""
    SERVER = auto()


@dataclass(frozen=True)
class Limits:
    """What a peer may make us keep."""

    control_frame: int = 32 * 1024
    header_block: int = 64 * 1024
    """Bytes of one block, decompressed."""
    headers: int = 128
    streams: int = 1024
    """Opened by the peer, at once; more are refused."""
    window: int = frames.INITIAL_WINDOW
    """Bytes that may be under way, per stream and in all: an update is sent for each half of it."""


class _Stream:
    __slots__ = ("local", "receive", "remote", "send")

    def __init__(self, window: int, receive: int) -> None:
        self.local = self.remote = Half.IDLE
        self.send, self.receive = SendWindow(window), ReceiveWindow(receive)


class Connection:
    """Not usable after RemoteProtocolError but for sending what is queued."""

    def __init__(
        self, role: Role, *, limits: Limits = Limits(), flow_control: FlowControl = FlowControl.AUTO
    ) -> None:
        self.role, self._limits, self._flow = role, limits, flow_control
        self._client = role is Role.CLIENT
        self._streams: dict[int, _Stream] = {}
        self._next_stream = 1 if self._client else 2
        self._next_ping = self._next_stream
        self._last_remote = 0
        self._remote_count = 0
        self._peer_max_streams = frames.MAX_ID
        self._initial_send = frames.INITIAL_WINDOW
        self._send, self._receive = SendWindow(), ReceiveWindow(limits.window)
        self._heeding = flow_control is FlowControl.OBEYED
        self._giving = flow_control is not FlowControl.NONE
        self._compressor = HeaderCompressor()
        self._decoder = ControlDecoder(limits.header_block, limits.headers)
        self._rest = b""
        self._payload = 0  # bytes of the current DATA frame still to come
        self._payload_stream = 0  # 0: it is thrown away
        self._payload_fin = False
        self._out: list[Buffer] = []
        self._leaving = False
        self._peer_leaving = False
        self._failure: RemoteProtocolError | None = None

    # -- what a caller may ask ----------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """How many are open, at least one way."""
        return len(self._streams)

    def is_open(self, stream: int) -> bool:
        return stream in self._streams

    def must_reply(self, stream: int) -> bool:
        """Whether it is the peer's and waits for `reply`."""
        found = self._streams.get(stream)
        return found is not None and found.local is Half.MUST_REPLY

    def can_send(self, stream: int) -> bool:
        """Whether `send_data` is allowed in the stream's state."""
        found = self._streams.get(stream)
        return found is not None and found.local is Half.OPEN

    def window(self, stream: int) -> int:
        """How many bytes `send_data` takes now."""
        found = self._streams.get(stream)
        if found is None:
            return 0
        return max(0, min(found.send.left, self._send.left)) if self._heeding else _UNLIMITED

    # -- sending ------------------------------------------------------------------------------------------

    def data_to_send(self) -> list[Buffer]:
        """What is to be written, in order; asked for once."""
        out, self._out = self._out, []
        return out

    def open_stream(self, headers: Headers, *, fin: bool = False, priority: int = 0) -> int:
        """SYN_STREAM; gives the number. Raises LocalProtocolError: too many, or the session is ending."""
        if self._failure is not None or self._leaving or self._peer_leaving:
            raise LocalProtocolError("the session takes no new streams")
        if len(self._streams) - self._remote_count >= self._peer_max_streams:
            raise LocalProtocolError(f"the peer takes {self._peer_max_streams} streams at once")
        number = self._next_stream
        if number > frames.MAX_ID:
            raise LocalProtocolError("the session has used up its stream numbers")
        block = self._compressor.encode(headers)
        self._next_stream += 2
        made = self._streams[number] = _Stream(self._initial_send, self._limits.window)
        made.local = step(Half.IDLE, Sends.SYN_FIN if fin else Sends.SYN)
        made.remote = Half.MUST_REPLY
        self._out.append(frames.syn_stream(number, 0, priority, block, FLAG_FIN if fin else 0))
        return number

    def reply(self, stream: int, headers: Headers = (), *, fin: bool = False) -> None:
        """SYN_REPLY to a stream of the peer's. Raises LocalProtocolError."""
        self._send_headers(stream, headers, Sends.REPLY, FrameType.SYN_REPLY, fin=fin)

    def send_headers(self, stream: int, headers: Headers, *, fin: bool = False) -> None:
        """Raises LocalProtocolError."""
        self._send_headers(stream, headers, Sends.HEADERS, FrameType.HEADERS, fin=fin)

    def _send_headers(
        self, stream: int, headers: Headers, sends: Sends, kind: FrameType, *, fin: bool
    ) -> None:
        found, after = self._step_local(stream, sends, fin=fin)
        block = self._compressor.encode(headers)
        found.local = after
        self._out.append(frames.with_headers(kind, stream, block, fin=fin))
        self._tidy(stream, found)

    def send_data(self, stream: int, data: Buffer, *, fin: bool = False) -> None:
        """At most `window` bytes. Raises LocalProtocolError."""
        found, after = self._step_local(stream, Sends.DATA, fin=fin)
        length = len(data)
        if length > self.window(stream):
            raise LocalProtocolError(f"stream {stream}: {length} bytes, {self.window(stream)} fit the window")
        found.local = after
        found.send.left -= length
        self._send.left -= length
        if length <= _DATA_PIECE:
            self._out.append(frames.data_header(stream, length, fin=fin))
            if length:
                self._out.append(data)
        else:
            view = memoryview(data)
            for start in range(0, length, _DATA_PIECE):
                piece = view[start : start + _DATA_PIECE]
                last = fin and start + len(piece) == length
                self._out += (frames.data_header(stream, len(piece), fin=last), piece)
        self._tidy(stream, found)

    def end(self, stream: int) -> None:
        """Nothing more will be sent on it: an empty DATA with FLAG_FIN. Raises LocalProtocolError."""
        self.send_data(stream, b"", fin=True)

    def reset(self, stream: int, status: ResetStatus = ResetStatus.CANCEL) -> None:
        """End both halves; a stream that is gone is fine."""
        if self._streams.get(stream) is not None:
            self._forget(stream)
            self._out.append(frames.rst_stream(stream, status))

    def ping(self) -> int:
        """Gives the number that PingAnswered will carry."""
        ident = self._next_ping
        self._next_ping = ident + 2 if ident + 2 <= frames.MAX_ID else 1 if self._client else 2
        self._out.append(frames.ping(ident))
        return ident

    def close(self, status: GoAwayStatus = GoAwayStatus.OK) -> None:
        """GOAWAY, once: the peer's later streams are ignored, those that are open go on."""
        if not self._leaving:
            self._leaving = True
            self._out.append(frames.goaway(self._last_remote, status))

    def acknowledge(self, stream: int, count: int) -> None:
        """`count` bytes of DataReceived are consumed: room for as many more."""
        if not self._giving or count <= 0:
            return
        if delta := self._receive.consume(count):
            self._out.append(frames.window_update(0, delta))
        found = self._streams.get(stream)
        if found is not None and found.remote is Half.OPEN and (delta := found.receive.consume(count)):
            self._out.append(frames.window_update(stream, delta))

    def _step_local(self, stream: int, sends: Sends, *, fin: bool) -> tuple[_Stream, Half]:
        found = self._streams.get(stream)
        if found is None or self._failure is not None:
            raise LocalProtocolError(f"stream {stream} is not open")
        try:
            return found, step(found.local, FINAL[sends] if fin else sends)
        except NotAllowed as exc:
            raise LocalProtocolError(f"stream {stream}: {exc}") from None

    # -- receiving ----------------------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> list[Event]:
        """The events that `data` completes. Raises RemoteProtocolError, then and for ever after."""
        if self._failure is not None:
            raise RemoteProtocolError(str(self._failure), self._failure.status)
        events: list[Event] = []
        try:
            self._receive_all(data, events)
        except RemoteProtocolError as exc:
            self._failure, self._rest, exc.events = exc, b"", events
            self.close(exc.status)
            raise
        return events

    def _receive_all(self, data: bytes, events: list[Event]) -> None:
        if self._rest:
            data, self._rest = self._rest + data, b""
        view, end, position = memoryview(data), len(data), 0
        while True:
            if self._payload:
                piece = view[position : position + self._payload]
                if not piece:
                    return
                position += len(piece)
                self._payload -= len(piece)
                self._data(piece, events)
                if self._payload == 0:
                    self._data_end(events)
                continue
            if end - position < HEADER.size:
                break
            first, second = HEADER.unpack_from(data, position)
            length = second & 0xFFFFFF
            if first & 0x80000000:
                if length > self._limits.control_frame:
                    raise RemoteProtocolError(f"control frame of {length} bytes")
                start = position + HEADER.size
                if end - start < length:
                    break
                position = start + length
                self._control(first, second >> 24, view[start:position], events)
            else:
                position += HEADER.size
                self._data_start(first, second >> 24, length, events)
        if position < end:
            self._rest = data[position:]

    def _data_start(self, stream: int, flags: int, length: int, events: list[Event]) -> None:
        if stream == 0:
            raise RemoteProtocolError("DATA on stream 0")
        self._payload, self._payload_fin = length, bool(flags & FLAG_FIN)
        self._payload_stream = stream if self._may_send_data(stream, length, events) else 0
        if length == 0:
            self._data_end(events)

    def _may_send_data(self, stream: int, length: int, events: list[Event]) -> bool:
        self._count_session(length)
        found = self._streams.get(stream)
        if found is None:
            if self._unborn(stream):
                self._out.append(frames.rst_stream(stream, ResetStatus.INVALID_STREAM))
            return False  # of one that is over, more may have been under way
        try:
            step(found.remote, Sends.DATA)
        except NotAllowed as exc:
            self._violation(stream, exc.status, events)
            return False
        if self._giving:
            found.receive.left -= length
            if found.receive.left < 0 and self._flow is FlowControl.OBEYED:
                self._violation(stream, ResetStatus.FLOW_CONTROL_ERROR, events)
                return False
        return True

    def _count_session(self, length: int) -> None:
        if self._giving:
            self._receive.left -= length
            if self._receive.left < 0 and self._flow is FlowControl.OBEYED:
                raise RemoteProtocolError("more DATA than the session's window allows")

    def _data(self, piece: memoryview, events: list[Event]) -> None:
        if self._payload_stream in self._streams:
            events.append(DataReceived(self._payload_stream, piece))
        else:
            self.acknowledge(0, len(piece))

    def _data_end(self, events: list[Event]) -> None:
        stream, found = self._payload_stream, self._streams.get(self._payload_stream)
        if self._payload_fin and found is not None:
            self._end_remote(stream, found, Sends.DATA, events)

    def _end_remote(self, stream: int, found: _Stream, sends: Sends, events: list[Event]) -> None:
        found.remote = step(found.remote, FINAL[sends])
        events.append(StreamEnded(stream))
        self._tidy(stream, found)

    def _control(self, first: int, flags: int, payload: memoryview, events: list[Event]) -> None:
        version, kind = first >> 16 & 0x7FFF, first & 0xFFFF
        if version != frames.VERSION:
            raise RemoteProtocolError(f"control frame of SPDY version {version}")
        frame = self._decoder.decode(kind, flags, payload)
        match frame:
            case HeaderFrame():
                self._header_frame(frame, events)
            case ResetFrame():
                if frame.stream in self._streams:
                    self._forget(frame.stream)
                    events.append(StreamReset(frame.stream, frame.status))
            case PingFrame():
                if frame.ident % 2 == self._next_ping % 2:
                    events.append(PingAnswered(frame.ident))
                else:
                    self._out.append(frames.ping(frame.ident))
            case GoawayFrame():
                self._peer_leaving = True
                events.append(GoneAway(frame.last_stream, frame.status))
            case WindowFrame():
                self._window_frame(frame, events)
            case SettingsFrame():
                self._settings(frame, events)
            case None:  # of a type that there is not: ignored, says section 2.2.1
                pass

    def _header_frame(self, frame: HeaderFrame, events: list[Event]) -> None:
        stream, fin = frame.stream, bool(frame.flags & FLAG_FIN)
        if frame.kind is FrameType.SYN_STREAM:
            self._syn_stream(frame, events)
            return
        found = self._streams.get(stream)
        if found is None:
            if self._unborn(stream):
                self._out.append(frames.rst_stream(stream, ResetStatus.INVALID_STREAM))
            return
        sends = Sends.REPLY if frame.kind is FrameType.SYN_REPLY else Sends.HEADERS
        try:
            after = step(found.remote, sends)
        except NotAllowed as exc:
            self._violation(stream, exc.status, events)
            return
        if isinstance(frame.headers, InvalidHeaders):
            self._violation(stream, ResetStatus.PROTOCOL_ERROR, events)
            return
        made: Event = (
            StreamReplied(stream, frame.headers)
            if sends is Sends.REPLY
            else HeadersReceived(stream, frame.headers)
        )
        events.append(made)
        if fin:
            self._end_remote(stream, found, sends, events)
        else:
            found.remote = after

    def _syn_stream(self, frame: HeaderFrame, events: list[Event]) -> None:
        stream = frame.stream
        if stream % 2 == self._next_stream % 2 or stream <= self._last_remote:
            raise RemoteProtocolError(f"SYN_STREAM of stream {stream}, the last was {self._last_remote}")
        self._last_remote = stream
        if self._leaving:
            return
        if isinstance(frame.headers, InvalidHeaders):
            self._out.append(frames.rst_stream(stream, ResetStatus.PROTOCOL_ERROR))
            return
        if self._remote_count >= self._limits.streams:
            self._out.append(frames.rst_stream(stream, ResetStatus.REFUSED_STREAM))
            return
        fin, unidirectional = bool(frame.flags & FLAG_FIN), bool(frame.flags & FLAG_UNIDIRECTIONAL)
        made = self._streams[stream] = _Stream(self._initial_send, self._limits.window)
        self._remote_count += 1
        made.remote = step(Half.IDLE, Sends.SYN)
        made.local = Half.DONE if unidirectional else Half.MUST_REPLY
        events.append(StreamOpened(stream, frame.headers, frame.associated, frame.priority, unidirectional))
        if fin:
            made.remote = Half.DONE
            events.append(StreamEnded(stream))
            self._tidy(stream, made)

    def _window_frame(self, frame: WindowFrame, events: list[Event]) -> None:
        stream, found = frame.stream, self._streams.get(frame.stream)
        if stream and found is None:
            return
        window = found.send if found is not None else self._send
        if frame.delta and window.open(frame.delta):
            self._heeding = self._heeding or self._flow is FlowControl.AUTO
            events.append(WindowOpened(stream))
        elif stream:
            status = ResetStatus.FLOW_CONTROL_ERROR if frame.delta else ResetStatus.PROTOCOL_ERROR
            self._violation(stream, status, events)
        else:
            raise RemoteProtocolError(f"WINDOW_UPDATE of the session by {frame.delta}")

    def _settings(self, frame: SettingsFrame, events: list[Event]) -> None:
        for key, value in frame.values:
            if key == Setting.MAX_CONCURRENT_STREAMS:
                self._peer_max_streams = value
            elif key == Setting.INITIAL_WINDOW_SIZE:
                if value > frames.MAX_WINDOW:
                    raise RemoteProtocolError(f"initial window of {value} bytes")
                self._heeding = self._heeding or self._flow is FlowControl.AUTO
                for found in self._streams.values():
                    if not found.send.open(value - self._initial_send):
                        raise RemoteProtocolError("a window grew beyond what there is")
                self._initial_send = value
        events.append(SettingsReceived(frame.values))

    # -- streams ------------------------------------------------------------------------------------------

    def _unborn(self, stream: int) -> bool:
        """Whether no stream of this number was ever opened."""
        return (
            stream >= self._next_stream if stream % 2 == self._next_stream % 2 else stream > self._last_remote
        )

    def _violation(self, stream: int, status: ResetStatus, events: list[Event]) -> None:
        self.reset(stream, status)
        events.append(StreamReset(stream, status, ours=True))

    def _tidy(self, stream: int, found: _Stream) -> None:
        if found.local is Half.DONE and found.remote is Half.DONE:
            self._forget(stream)

    def _forget(self, stream: int) -> None:
        if self._streams.pop(stream, None) is not None and stream % 2 != self._next_stream % 2:
            self._remote_count -= 1
