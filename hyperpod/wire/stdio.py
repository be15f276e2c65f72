"""Stdio of containers as frames on a connection of its own per stream (DESIGN section 6). Sans-IO.

    frame    type u8, reserved u8 (0), payload length u32, offset u64, payload; big-endian

    host     OPEN {"container", "exec", "stream", "from_offset"}     exec is "" for the container's own
    agent    OPENED(offset where it starts) or ERROR(text)
    stdout   agent: DATA(offset) ... GAP(first available) ... EOF(total)    host: ACK(offset), cumulative
    stdin    host: DATA(offset) ... EOF(total)                              agent: ACK(offset), cumulative
    process  see wire.process: an exec's life, terminal sizes, the exit     port  see wire.portpipe

An agent on this host can hand a stream over: for an OPEN that asks for it ("direct") OPENED carries a descriptor of
the pipe, or of the port's socket (SCM_RIGHTS), and HANDOVER(offset) says that the stream goes on there. An exec's
output is then read there by the host to its end, its input written there; its stdin's EOF(0) still tells the agent
to close its own copy. The connection stays, as the sign that the host is there.

Offsets count the bytes of the stream from its first one. A sender has at most WINDOW bytes unacknowledged; it
then stops reading its source: back-pressure, never a drop. A connection that ends before EOF has failed.
A container's stdout and stderr can be opened again from a later offset; what was not acknowledged is kept.
"""

from __future__ import annotations

import json
import re
import struct
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from hyperpod.errors import ProtocolError

HEADER = struct.Struct("!BBIQ")
MAX_PAYLOAD = 64 * 1024
WINDOW = 256 * 1024
"""Bytes that a sender may have unacknowledged, and therefore keeps."""
ACK_EVERY = 64 * 1024
"""Receivers acknowledge at least this often, so that a sender never waits for a full window."""
MAX_OFFSET = 2**63 - 1
MAX_TEXT = 1024
STREAMS = ("stdin", "stdout", "stderr", "process", "port")
_CONTAINER = re.compile(r"[0-9a-f]{64}")
_EXEC = re.compile(r"([0-9a-f]{32})?")

Buffer = bytes | bytearray | memoryview


class FrameType(IntEnum):
    OPEN = 1
    OPENED = 2
    DATA = 3
    EOF = 4
    GAP = 5
    ACK = 6
    ERROR = 7
    START = 8
    EXIT = 9
    RESIZE = 10
    HANDOVER = 11


_CARRIES_PAYLOAD = {FrameType.OPEN, FrameType.DATA, FrameType.ERROR, FrameType.START, FrameType.EXIT}


class Frame(NamedTuple):
    """One frame; `payload` may point into the bytes that were fed."""

    type: FrameType
    offset: int
    payload: bytes | memoryview = b""


@dataclass(frozen=True)
class Open:
    """What the host asks for. `exec_id` is empty for the container's own streams, `container` for a port; with an
    `exec_id` and no `container` it is a shell of the operator's, beside the containers."""

    container: str
    stream: str
    exec_id: str = ""
    from_offset: int = 0
    port: int = 0
    tty: bool = False
    stdin: bool = False
    direct: bool = False
    """The host takes the descriptor instead, if the agent can give it: of an exec's pipes, of a port's socket."""


class StreamRefused(ProtocolError):
    """The peer sent ERROR: it does not know the stream, or gave up on it. The text is the peer's, raw."""


def encode(kind: FrameType, offset: int = 0, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return HEADER.pack(kind, 0, len(payload), offset) + payload


def encode_open(request: Open) -> bytes:
    fields: dict[str, object] = {
        "container": request.container,
        "exec": request.exec_id,
        "stream": request.stream,
        "from_offset": request.from_offset,
    }
    if request.stream == "port":
        fields["port"] = request.port
    elif request.stream == "process":
        fields |= {"tty": request.tty, "stdin": request.stdin}
    if request.direct:
        fields["direct"] = True
    return encode(FrameType.OPEN, 0, json.dumps(fields).encode())


def encode_opened(offset: int) -> bytes:
    return encode(FrameType.OPENED, offset)


def encode_ack(offset: int) -> bytes:
    return encode(FrameType.ACK, offset)


def encode_eof(total: int) -> bytes:
    return encode(FrameType.EOF, total)


def encode_handover(offset: int) -> bytes:
    return encode(FrameType.HANDOVER, offset)


def encode_gap(first: int) -> bytes:
    return encode(FrameType.GAP, first)


def encode_error(text: str) -> bytes:
    return encode(FrameType.ERROR, 0, text.encode(errors="replace")[:MAX_TEXT])


def encode_data(offset: int, data: bytes | memoryview) -> list[bytes | memoryview]:
    """Buffers (for writelines or sendmsg) of as many DATA frames as `data` needs; nothing is copied."""
    out: list[bytes | memoryview] = []
    if len(data) <= MAX_PAYLOAD:
        if data:
            out += (HEADER.pack(FrameType.DATA, 0, len(data), offset), data)
        return out
    view = memoryview(data)
    for start in range(0, len(view), MAX_PAYLOAD):
        piece = view[start : start + MAX_PAYLOAD]
        out += (HEADER.pack(FrameType.DATA, 0, len(piece), offset + start), piece)
    return out


def decode_open(frame: Frame) -> Open:
    """Raises ProtocolError unless the frame is a valid OPEN."""
    if frame.type is not FrameType.OPEN:
        raise ProtocolError(f"stdio: {frame.type.name} where OPEN was due")
    try:
        fields = json.loads(bytes(frame.payload))
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("stdio: OPEN is not JSON") from exc
    if not isinstance(fields, dict):
        raise ProtocolError("stdio: OPEN is not an object")
    container, exec_id = fields.get("container"), fields.get("exec")
    stream, start = fields.get("stream"), fields.get("from_offset")
    if stream == "port":
        return _decode_port(fields)
    if not isinstance(exec_id, str) or not _EXEC.fullmatch(exec_id):
        raise ProtocolError("stdio: OPEN with a malformed exec id")
    if not isinstance(container, str) or not (_CONTAINER.fullmatch(container) or (exec_id and not container)):
        raise ProtocolError("stdio: OPEN with a malformed container id")
    if not isinstance(stream, str) or stream not in STREAMS:
        raise ProtocolError("stdio: OPEN of an unknown stream")
    if type(start) is not int or not 0 <= start <= MAX_OFFSET:
        raise ProtocolError("stdio: OPEN with a malformed offset")
    tty, stdin, direct = (fields.get(name, False) for name in ("tty", "stdin", "direct"))
    if not isinstance(tty, bool) or not isinstance(stdin, bool) or not isinstance(direct, bool):
        raise ProtocolError("stdio: OPEN with malformed flags")
    if direct and (not exec_id or start or stream == "process"):
        raise ProtocolError(f"stdio: {stream} cannot be handed over")
    return Open(container, stream, exec_id, start, tty=tty, stdin=stdin, direct=direct)


def _decode_port(fields: dict[str, object]) -> Open:
    port = fields.get("port")
    if type(port) is not int or not 0 < port < 65536 or fields.get("container") or fields.get("exec"):
        raise ProtocolError("stdio: OPEN with a malformed port")
    direct = fields.get("direct", False)
    if not isinstance(direct, bool):
        raise ProtocolError("stdio: OPEN with malformed flags")
    return Open("", "port", port=port, direct=direct)


class FrameDecoder:
    """Bytes in, frames out; keeps less than one frame of at most HEADER.size + MAX_PAYLOAD bytes.

    DATA that has not come whole is passed on as far as it has: where it is cut means nothing, and no copy is made.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._left = self._offset = 0  # of the current DATA frame: bytes still to come, and where they belong

    @property
    def pending(self) -> int:
        """Bytes kept or missing of an incomplete frame; not zero at a connection's end means that it was cut."""
        return len(self._rest) + self._left

    def feed(self, data: bytes) -> list[Frame]:
        """Every frame that `data` completes, and parts of DATA. Raises ProtocolError, and is then unusable."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        frames: list[Frame] = []
        view, end = memoryview(data), len(data)
        position = self._data(view, 0, frames) if self._left else 0
        while end - position >= HEADER.size:
            number, reserved, length, offset = HEADER.unpack_from(data, position)
            kind = _check(number, reserved, length, offset)
            start = position + HEADER.size
            if kind is FrameType.DATA:
                self._left, self._offset = length, offset
                position = self._data(view, start, frames)
                continue
            if end - start < length:
                break
            position = start + length
            frames.append(Frame(kind, offset, view[start:position] if length else b""))
        if position < end:
            self._rest = data[position:]
        return frames

    def _data(self, view: memoryview, start: int, frames: list[Frame]) -> int:
        """Gives where the next frame begins."""
        if piece := view[start : start + self._left]:
            frames.append(Frame(FrameType.DATA, self._offset, piece))
            self._left -= len(piece)
            self._offset += len(piece)
        return start + len(piece)


def _check(number: int, reserved: int, length: int, offset: int) -> FrameType:
    try:
        kind = FrameType(number)
    except ValueError as exc:
        raise ProtocolError(f"stdio: frame of unknown type {number}") from exc
    if reserved:
        raise ProtocolError("stdio: reserved byte is not 0")
    if length > MAX_PAYLOAD:
        raise ProtocolError(f"stdio: frame of {length} bytes")
    if length and kind not in _CARRIES_PAYLOAD:
        raise ProtocolError(f"stdio: {kind.name} with a payload")
    if not length and kind in (FrameType.DATA, FrameType.OPEN, FrameType.START):
        raise ProtocolError(f"stdio: empty {kind.name}")
    if offset > MAX_OFFSET or (kind in (FrameType.OPEN, FrameType.ERROR) and offset):
        raise ProtocolError(f"stdio: {kind.name} with offset {offset}")
    return kind


def check_handover(request: Open, frame: Frame, offset: int) -> None:
    """Raises ProtocolError unless it was asked for, and goes on where the stream is."""
    if not request.direct or frame.offset != offset:
        raise ProtocolError(f"stdio: HANDOVER at {frame.offset} that was not asked for, or not there")


class _Receiver:
    """In-order reception with cumulative acknowledgement; what both directions share."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        """Of the next byte to come."""
        self.acked = offset
        self.eof = False
        self._skipped = 0  # bytes between acked and offset that never came: they take no room of the window

    def _data(self, frame: Frame) -> None:
        if self.eof:
            raise ProtocolError("stdio: DATA after EOF")
        if frame.offset != self.offset:
            raise ProtocolError(f"stdio: DATA at {frame.offset}, due was {self.offset}")
        if self.offset + len(frame.payload) - self.acked - self._skipped > WINDOW:
            raise ProtocolError("stdio: more than a window of data without acknowledgement")
        self.offset += len(frame.payload)

    def _end(self, frame: Frame) -> None:
        if self.eof or frame.offset != self.offset:
            raise ProtocolError(f"stdio: EOF at {frame.offset}, due was {self.offset}")
        self.eof = True

    def ack(self, offset: int) -> bytes:
        """The ACK frame for everything before `offset`, which must have been received."""
        if not self.acked <= offset <= self.offset:
            raise ValueError(f"ack of {offset} outside of {self.acked}..{self.offset}")
        self.acked = offset
        if offset == self.offset:
            self._skipped = 0
        return encode_ack(offset)


class HostReader(_Receiver):
    """The host's side of one connection that reads stdout or stderr.

    Send `start()`, feed what arrives, handle the DATA frames, send `ack()`. Gaps move `offset` and count in
    `gap_bytes`. A connection that ends while `eof` is False has failed. Once `handed_over`, nothing more comes.
    """

    def __init__(self, request: Open) -> None:
        super().__init__(request.from_offset)
        self.request = request
        self.opened = self.handed_over = False
        self.gap_bytes = 0
        self._decoder = FrameDecoder()

    def start(self) -> bytes:
        return encode_open(self.request)

    def feed(self, data: bytes) -> list[Frame]:
        """The DATA frames that came; one that does not follow the last is after a gap.

        Raises ProtocolError, StreamRefused.
        """
        out: list[Frame] = []
        for frame in self._decoder.feed(data):
            kind = frame.type
            if kind is FrameType.ERROR:
                raise StreamRefused(bytes(frame.payload).decode(errors="replace"))
            if self.handed_over:
                raise ProtocolError(f"stdio: {kind.name} after HANDOVER")
            if not self.opened:
                if kind is not FrameType.OPENED:
                    raise ProtocolError(f"stdio: {kind.name} where OPENED was due")
                self.opened = True
                self._skip(frame.offset)
            elif kind is FrameType.DATA:
                self._data(frame)
                out.append(frame)
            elif kind is FrameType.EOF:
                self._end(frame)
            elif kind is FrameType.GAP:
                if self.eof:
                    raise ProtocolError("stdio: GAP after EOF")
                self._skip(frame.offset)
            elif kind is FrameType.HANDOVER and not self.eof:
                check_handover(self.request, frame, self.offset)
                self.handed_over = True
            else:
                raise ProtocolError(f"stdio: {kind.name} from a sender")
        return out

    def _skip(self, offset: int) -> None:
        if offset < self.offset:
            raise ProtocolError(f"stdio: stream goes back to {offset} from {self.offset}")
        self.gap_bytes += offset - self.offset
        if self.acked == self.offset:
            self.acked = offset
        else:
            self._skipped += offset - self.offset
        self.offset = offset


class AgentSender:
    """The agent's side of a stdout or stderr, over all connections that ever read it.

    Read at most `room` bytes from the pipe, hand them to `feed`, send what `take` returns. A connection comes
    by `attach` (ending any earlier one) and goes by `detach`; what is not acknowledged is sent again.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._chunks: deque[tuple[int, bytes]] = deque()
        self.base = 0
        """Everything before is acknowledged and gone."""
        self.end = 0
        self.sent = 0
        self.finished = False
        self.attached = False
        self._eof_sent = False

    @property
    def room(self) -> int:
        """Bytes that may be read from the pipe now."""
        return 0 if self.finished else self._window - (self.end - self.base)

    @property
    def drained(self) -> bool:
        """The host has acknowledged everything up to the end."""
        return self.finished and self.base == self.end

    def feed(self, data: bytes) -> None:
        """Keep and queue what was read from the pipe; at most `room` bytes."""
        if len(data) > self.room:
            raise ValueError(f"{len(data)} bytes fed, room for {self.room}")
        if data:
            self._chunks.append((self.end, data))
            self.end += len(data)

    def finish(self) -> None:
        """The pipe is at its end."""
        self.finished = True

    def attach(self, from_offset: int) -> bytes:
        """A new connection reads from `from_offset`; returns OPENED. Raises ProtocolError: not there yet."""
        if from_offset > self.end:
            raise ProtocolError(f"stdio: opened at {from_offset}, the stream has {self.end} bytes")
        self.ack(max(from_offset, self.base), opening=True)
        self.sent = self.base
        self.attached, self._eof_sent = True, False
        return encode_opened(self.base)

    def detach(self) -> None:
        self.attached = False

    def take(self) -> list[bytes | memoryview]:
        """Buffers to write on the connection now: unsent DATA, then EOF once."""
        out: list[bytes | memoryview] = []
        if not self.attached:
            return out
        if self.sent < self.end:
            for start, chunk in self._chunks:
                if start + len(chunk) > self.sent:
                    skip = max(0, self.sent - start)
                    out += encode_data(start + skip, memoryview(chunk)[skip:] if skip else chunk)
            self.sent = self.end
        if self.finished and not self._eof_sent:
            self._eof_sent = True
            out.append(encode_eof(self.end))
        return out

    def receive(self, frame: Frame) -> None:
        """A frame of the host after OPEN: only ACK is allowed. Raises ProtocolError."""
        if frame.type is not FrameType.ACK:
            raise ProtocolError(f"stdio: {frame.type.name} from a reader")
        self.ack(frame.offset)

    def ack(self, offset: int, *, opening: bool = False) -> None:
        """Forget everything before `offset`. Raises ProtocolError when it was never sent."""
        if not self.base <= offset <= (self.end if opening else self.sent):
            raise ProtocolError(f"stdio: ACK of {offset}, sent were {self.base}..{self.sent}")
        self.base = offset
        while self._chunks and self._chunks[0][0] + len(self._chunks[0][1]) <= offset:
            self._chunks.popleft()


class StdinSender:
    """The host's side of a stdin. Nothing is kept: stdin does not resume."""

    def __init__(self, request: Open) -> None:
        self.request = request
        self.offset = self.acked = 0
        self.opened = self.finished = self.handed_over = False
        self._decoder = FrameDecoder()

    def start(self) -> bytes:
        return encode_open(self.request)

    @property
    def room(self) -> int:
        """Bytes that may be taken from the source now."""
        return WINDOW - (self.offset - self.acked) if self.opened and not self.finished else 0

    def data(self, data: bytes | memoryview) -> list[bytes | memoryview]:
        """Buffers to send; at most `room` bytes."""
        if len(data) > self.room:
            raise ValueError(f"{len(data)} bytes given, room for {self.room}")
        out = encode_data(self.offset, data)
        self.offset += len(data)
        return out

    def finish(self) -> bytes:
        """The source is at its end; returns EOF."""
        self.finished = True
        return encode_eof(self.offset)

    def feed(self, data: bytes) -> None:
        """Take OPENED and ACKs. Raises ProtocolError, StreamRefused."""
        for frame in self._decoder.feed(data):
            if frame.type is FrameType.ERROR:
                raise StreamRefused(bytes(frame.payload).decode(errors="replace"))
            if not self.opened:
                if frame.type is not FrameType.OPENED or frame.offset:
                    raise ProtocolError(f"stdio: {frame.type.name} where OPENED was due")
                self.opened = True
            elif frame.type is FrameType.HANDOVER and not self.handed_over:
                check_handover(self.request, frame, self.offset)
                self.handed_over = True
            elif frame.type is not FrameType.ACK or not self.acked <= frame.offset <= self.offset:
                raise ProtocolError(f"stdio: {frame.type.name} of {frame.offset} from a stdin")
            else:
                self.acked = frame.offset


class StdinReceiver(_Receiver):
    """The agent's side of a stdin: payloads to write into the pipe, at most WINDOW bytes unwritten."""

    def __init__(self) -> None:
        super().__init__(0)

    def receive(self, frame: Frame) -> bytes | memoryview:
        """The payload of DATA, b"" for EOF (see `eof`). Raises ProtocolError."""
        if frame.type is FrameType.DATA:
            self._data(frame)
            return frame.payload
        if frame.type is FrameType.EOF:
            self._end(frame)
            return b""
        raise ProtocolError(f"stdio: {frame.type.name} from a stdin's sender")
