"""Stdio of containers as frames on a connection of its own per stream (DESIGN section 6). Sans-IO.

Here are the frames; what either end of a stream does with them is in wire.stdioends.

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
