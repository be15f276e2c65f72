"""The ends of a stream of stdio: what each holds, expects and acknowledges. Sans-IO; the frames are wire.stdio's.

stdout, stderr   AgentSender, HostReader          stdin   StdinSender (the host), StdinReceiver (the agent)
"""

from __future__ import annotations

from collections import deque

from hyperpod.errors import ProtocolError
from hyperpod.wire.stdio import (
    WINDOW,
    Frame,
    FrameDecoder,
    FrameType,
    Open,
    StreamRefused,
    check_handover,
    encode_ack,
    encode_data,
    encode_eof,
    encode_open,
    encode_opened,
)


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
