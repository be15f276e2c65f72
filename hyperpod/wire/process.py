"""The `process` stream of a stdio connection: the life of an exec, or a view of a container's. Sans-IO.

    host     OPEN {..., "stream": "process", "tty", "stdin"}
             START(bytes that follow; payload: of the OCI process as JSON)   only with an exec id; the last one,
                 which no more follow, creates and starts it
             RESIZE(rows << 16 | columns)
    agent    OPENED     it runs; its stdin, stdout and stderr can be opened
             EXIT(code; payload: why it did not start)     once; before OPENED when it never ran
             ERROR(text)

An operator's shell is started by StartExec of the control port, and only held by this connection: no START.

An exec, and a shell, lives as long as this connection: when it is lost, the process is hung up and then killed.
After EXIT the host reads the outputs to their end and closes, whereupon the exec is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

from hyperpod.errors import InvalidArgument, ProtocolError
from hyperpod.wire.stdio import (
    MAX_PAYLOAD,
    MAX_TEXT,
    Frame,
    FrameDecoder,
    FrameType,
    Open,
    StreamRefused,
    encode,
    encode_open,
)

MAX_PROCESS = 2 * 1024 * 1024
"""Bytes of the OCI process: what Linux takes of arguments and environment."""

EXIT_NOT_FOUND, EXIT_NOT_EXECUTABLE = 127, 126
"""As shells tell of a program that they cannot run."""

OUTPUT_GRACE = 1.0
"""Seconds without output after which an ended process's streams end, though others may hold its pipes."""


@dataclass(frozen=True)
class Exit:
    """`text` is only set when it did not start; the guest chose it."""

    code: int
    text: str = ""


def encode_resize(rows: int, columns: int) -> bytes:
    return encode(FrameType.RESIZE, rows << 16 | columns)


def decode_resize(value: int) -> tuple[int, int]:
    """Rows and columns. Raises ProtocolError."""
    rows, columns = value >> 16, value & 0xFFFF
    if not (0 < rows < 65536 and columns):
        raise ProtocolError(f"stdio: a terminal of {rows} rows and {columns} columns")
    return rows, columns


def encode_exit(code: int, text: str = "") -> bytes:
    return encode(FrameType.EXIT, code, text.encode(errors="replace")[:MAX_TEXT])


class Starting:
    """The agent's side of START."""

    def __init__(self) -> None:
        self._process = bytearray()
        self._left: int | None = None

    def feed(self, frame: Frame) -> bytes | None:
        """The process, once it is whole. Raises ProtocolError."""
        left = frame.offset + len(frame.payload)
        if left + len(self._process) > MAX_PROCESS or self._left not in (None, left):
            raise ProtocolError(f"stdio: START of {left} bytes behind {len(self._process)}")
        self._process += frame.payload
        self._left = frame.offset
        return None if frame.offset else bytes(self._process)


class HostProcess:
    """The host's side. `process`: the OCI process as JSON, None to only watch."""

    def __init__(self, request: Open, process: bytes | None) -> None:
        """Raises InvalidArgument: the process is too large."""
        if process is not None and len(process) > MAX_PROCESS:
            raise InvalidArgument(f"arguments and environment take {len(process)} bytes, {MAX_PROCESS} fit")
        self._request, self._process = request, process
        self._decoder = FrameDecoder()
        self.opened = False
        self.exit: Exit | None = None

    def start(self) -> bytes:
        frames, process = [encode_open(self._request)], self._process or b""
        for end in range(MAX_PAYLOAD, len(process) + MAX_PAYLOAD, MAX_PAYLOAD):
            frames.append(
                encode(FrameType.START, max(0, len(process) - end), process[end - MAX_PAYLOAD : end])
            )
        return b"".join(frames)

    def feed(self, data: bytes) -> None:
        """Look at `opened` and `exit` afterwards. Raises ProtocolError, StreamRefused."""
        for frame in self._decoder.feed(data):
            if frame.type is FrameType.ERROR:
                raise StreamRefused(bytes(frame.payload).decode(errors="replace"))
            if self.exit is not None:
                raise ProtocolError(f"stdio: {frame.type.name} after EXIT")
            if frame.type is FrameType.OPENED and not self.opened:
                self.opened = True
            elif frame.type is FrameType.EXIT and frame.offset < 256:
                self.exit = Exit(frame.offset, bytes(frame.payload).decode(errors="replace"))
            else:
                raise ProtocolError(f"stdio: {frame.type.name} of a process")
