"""Frames of container output and input between a host and an agent (DESIGN section 6); sans-IO.

A connection to the agent's stdio port carries one stream of one process. After the preface:

    type u8 | reserved u8 (0) | payload length u32 | offset u64 | payload      (network byte order)

The host opens with OPEN; the agent answers OPENED or ERROR. Output: the agent sends DATA, EOF (offset: total
bytes of the stream) and GAP (offset: first byte that is still there), the host sends ACK (offset: all bytes
before it are safe and may be forgotten). Input: the host sends DATA and EOF, the agent sends ACK.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum

from hyperpod.errors import ProtocolError

HEADER = struct.Struct("!BBIQ")
MAX_PAYLOAD = 64 * 1024
"""Bytes in one frame."""

WINDOW = 256 * 1024
"""Bytes of one stream that may be sent and not yet acknowledged."""

MAX_OFFSET = 2**63 - 1


class FrameType(IntEnum):
    """Number in the header's first byte."""

    OPEN = 1
    OPENED = 2
    DATA = 3
    EOF = 4
    GAP = 5
    ACK = 6
    ERROR = 7


class Frame:
    """One frame. A plain class with slots: millions of them pass through a shim."""

    __slots__ = ("offset", "payload", "type")

    def __init__(self, type: FrameType, offset: int = 0, payload: bytes = b"") -> None:
        self.type, self.offset, self.payload = type, offset, payload

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and (self.type, self.offset, self.payload) == (
            other.type,
            other.offset,
            other.payload,
        )

    __hash__ = None  # type: ignore[assignment]  # mutable on purpose

    def __repr__(self) -> str:
        return f"Frame({self.type.name}, offset={self.offset}, {len(self.payload)} bytes)"


@dataclass(frozen=True)
class Open:
    """Which stream a connection is for. `exec_id` is empty for the container's own process."""

    container: str
    exec_id: str
    stream: str
    from_offset: int = 0


_STREAMS = ("stdin", "stdout", "stderr")
_BARE = frozenset({FrameType.OPENED, FrameType.EOF, FrameType.GAP, FrameType.ACK})


class FrameDecoder:
    """Bytes in, frames out. Holds at most one frame's bytes beyond what it was fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """All frames that are complete now. Raises ProtocolError; the decoder is unusable then."""
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        at, end = 0, len(buffer)
        while end - at >= HEADER.size:
            number, reserved, length, offset = HEADER.unpack_from(buffer, at)
            if reserved or length > MAX_PAYLOAD or offset > MAX_OFFSET or not 1 <= number <= 7:
                raise ProtocolError(
                    f"stdio frame: bad header (type {number}, length {length}, offset {offset})"
                )
            kind = FrameType(number)
            if length and kind in _BARE:
                raise ProtocolError(f"stdio frame: {kind.name} carries {length} bytes, none are allowed")
            if end - at < HEADER.size + length:
                break
            at += HEADER.size
            frames.append(Frame(kind, offset, bytes(buffer[at : at + length])))
            at += length
        del buffer[:at]
        return frames


def encode(frame: Frame) -> bytes:
    """One frame's bytes."""
    return HEADER.pack(frame.type, 0, len(frame.payload), frame.offset) + frame.payload


def encode_open(what: Open) -> bytes:
    payload = {
        "container": what.container,
        "exec": what.exec_id,
        "stream": what.stream,
        "from_offset": what.from_offset,
    }
    return encode(Frame(FrameType.OPEN, 0, json.dumps(payload).encode()))


def decode_open(frame: Frame) -> Open:
    """Raises ProtocolError for anything but a well-formed OPEN."""
    if frame.type is not FrameType.OPEN:
        raise ProtocolError(f"stdio: {frame.type.name} before OPEN")
    try:
        data = json.loads(frame.payload)
        what = Open(data["container"], data["exec"], data["stream"], data["from_offset"])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ProtocolError("stdio: OPEN is not well-formed") from exc
    if (
        not all(isinstance(text, str) for text in (what.container, what.exec_id, what.stream))
        or what.stream not in _STREAMS
        or type(what.from_offset) is not int
        or not 0 <= what.from_offset <= MAX_OFFSET
    ):
        raise ProtocolError("stdio: OPEN has bad values")
    return what


def encode_data(offset: int, payload: bytes) -> bytes:
    return HEADER.pack(FrameType.DATA, 0, len(payload), offset) + payload


def encode_mark(type: FrameType, offset: int) -> bytes:
    """OPENED, EOF, GAP or ACK."""
    return HEADER.pack(type, 0, 0, offset)


def encode_error(text: str) -> bytes:
    return encode(Frame(FrameType.ERROR, 0, text.encode(errors="replace")[:1024]))


class OutputWindow:
    """The agent's side of one output stream: what is read and not yet acknowledged, at most WINDOW bytes."""

    def __init__(self) -> None:
        self.start = 0
        """Offset of the first byte still held."""
        self._held = bytearray()
        self.ended = False

    @property
    def end(self) -> int:
        """Offset after the last byte read."""
        return self.start + len(self._held)

    @property
    def room(self) -> int:
        """Bytes that may be read from the pipe now."""
        return max(0, WINDOW - len(self._held))

    def append(self, data: bytes) -> None:
        self._held += data

    def acknowledge(self, offset: int) -> None:
        """Forget what the host has. Raises ProtocolError for bytes that were never sent."""
        if offset > self.end:
            raise ProtocolError(f"stdio: ACK of {offset}, only {self.end} were sent")
        if offset > self.start:
            del self._held[: offset - self.start]
            self.start = offset

    def chunk(self, offset: int) -> bytes:
        """Up to one frame's payload from `offset` on; empty when there is none yet."""
        at = offset - self.start
        assert at >= 0, "the caller sends GAP first"
        return bytes(self._held[at : at + MAX_PAYLOAD])


class OutputReader:
    """The host's side of one output stream on one connection: checks what the guest sends."""

    def __init__(self, from_offset: int) -> None:
        self.offset = from_offset
        """Offset of the next byte."""
        self.gap_bytes = 0
        self.ended = False
        self._acknowledged = from_offset
        self._opened = False

    def receive(self, frame: Frame) -> bytes:
        """The bytes that a frame adds, maybe none. Raises ProtocolError."""
        kind = frame.type
        if kind is FrameType.ERROR:
            raise ProtocolError("stdio: the agent refuses: " + frame.payload[:300].decode(errors="replace"))
        if not self._opened:
            if kind is not FrameType.OPENED or frame.offset < self.offset:
                raise ProtocolError(f"stdio: {frame!r} where OPENED was due")
            self._opened = True
            self._skip(frame.offset)
        elif self.ended:
            raise ProtocolError(f"stdio: {frame!r} after EOF")
        elif kind is FrameType.DATA and frame.offset == self.offset:
            if self.offset + len(frame.payload) - self._acknowledged > WINDOW:
                raise ProtocolError("stdio: more than the window was sent unacknowledged")
            self.offset += len(frame.payload)
            return frame.payload
        elif kind is FrameType.GAP and frame.offset > self.offset:
            self._skip(frame.offset)
        elif kind is FrameType.EOF and frame.offset == self.offset:
            self.ended = True
        else:
            raise ProtocolError(f"stdio: {frame!r} does not follow offset {self.offset}")
        return b""

    def acknowledged(self, offset: int) -> None:
        """Everything before `offset` is safe; the caller sends the ACK frame."""
        self._acknowledged = offset

    def _skip(self, to: int) -> None:
        self.gap_bytes += to - self.offset
        self._acknowledged += to - self.offset
        self.offset = to
