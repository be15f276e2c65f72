"""The CRI log file: how lines become records, and how to find where to resume. Sans-IO.

    2024-05-06T07:08:09.123456789Z stdout F a whole line
    2024-05-06T07:08:09.123456789Z stderr P a piece of a line, the rest follows

A record carries at most LINE_LIMIT bytes of a line (as containerd's); more is cut into P records and a last F.
A line that has not ended yet is held back until it does, or the stream ends: then it is P. So the bytes of the
stream that a record stands for are its payload, plus 1 for the newline if it is F.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

from hyperpod.errors import ProtocolError

LINE_LIMIT = 16 * 1024
MAX_RECORD = 35 + len(" stdout F ") + LINE_LIMIT + 1
"""Bytes of the longest record with a timestamp of RFC 3339."""

STDOUT, STDERR = "stdout", "stderr"
_RECORD = re.compile(rb"[0-9TZ:.+-]{1,35} (stdout|stderr) ([FP]) ([^\n]*)\n")
_SECOND = 1_000_000_000


def timestamp(ns: int) -> bytes:
    """RFC 3339 with nanoseconds, UTC, of nanoseconds since the epoch."""
    seconds, rest = divmod(ns, _SECOND)
    return time.strftime("%Y-%m-%dT%H:%M:%S.%%09dZ", time.gmtime(seconds)).encode() % rest


class LineFormatter:
    """The bytes of one stream in, records out; keeps at most LINE_LIMIT bytes of an unfinished line.

    `offset` is the stream offset that the records returned so far reach to: what may be acknowledged once they
    are written.
    """

    def __init__(self, stream: str, offset: int = 0) -> None:
        self.offset = offset
        self._stream = stream.encode()
        self._held = b""

    @property
    def held(self) -> int:
        """Bytes of the unfinished line, beyond `offset`."""
        return len(self._held)

    def feed(self, pieces: list[bytes | memoryview], now_ns: int) -> list[bytes]:
        """Records (in pieces of any size) for what `pieces` complete, all with one timestamp."""
        data = b"".join((self._held, *pieces))
        full = self._prefix(now_ns, b"F")
        out: list[bytes] = []
        start = position = 0
        end = len(data)
        # In steps of a line limit: Python looks at one newline per 16 KiB, whatever the guest sends.
        while end - position > LINE_LIMIT:
            newline = data.rfind(b"\n", position, position + LINE_LIMIT + 1)
            if newline >= 0:
                position = newline + 1
                continue
            _whole_lines(data, start, position, full, out)
            out += (self._prefix(now_ns, b"P"), data[position : position + LINE_LIMIT], b"\n")
            start = position = position + LINE_LIMIT
        last = data.rfind(b"\n", position) + 1
        if last:
            position = last
        _whole_lines(data, start, position, full, out)
        self._held = data[position:]
        self.offset += position
        return out

    def finish(self, now_ns: int) -> list[bytes]:
        """The record for a line that will never end; nothing if there is none."""
        held, self._held = self._held, b""
        self.offset += len(held)
        return [self._prefix(now_ns, b"P"), held, b"\n"] if held else []

    def skip_to(self, offset: int, now_ns: int) -> list[bytes]:
        """The stream goes on at `offset`, beyond a gap; returns what `finish` does."""
        out = self.finish(now_ns)
        if offset < self.offset:
            raise ProtocolError(f"a gap back to {offset} from {self.offset}")
        self.offset = offset
        return out

    def _prefix(self, now_ns: int, tag: bytes) -> bytes:
        return b"%b %b %b " % (timestamp(now_ns), self._stream, tag)


def _whole_lines(data: bytes, start: int, end: int, prefix: bytes, out: list[bytes]) -> None:
    """Records of data[start:end], which is empty or ends with a newline; one pass in C."""
    if start < end:
        out += (prefix, data[start : end - 1].replace(b"\n", b"\n" + prefix), b"\n")


class Extent(NamedTuple):
    """What a stretch of log stands for: bytes of whole records, and of each stream's payload in them."""

    length: int = 0
    stdout: int = 0
    stderr: int = 0


class RecordScanner:
    """Reads a log from a known place on; `extent` covers the whole records seen so far."""

    def __init__(self) -> None:
        self.extent = Extent()
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Raises ProtocolError at a line that is no record of ours."""
        data = self._rest + data
        length, stdout, stderr = self.extent
        position = 0
        for match in _RECORD.finditer(data):
            if match.start() != position:
                break
            position = match.end()
            size = match.end(3) - match.start(3) + (match[2] == b"F")
            if match[1] == b"stdout":
                stdout += size
            else:
                stderr += size
        self.extent = Extent(length + position, stdout, stderr)
        self._rest = data[position:]
        if b"\n" in self._rest or len(self._rest) > MAX_RECORD:
            raise ProtocolError(f"no CRI log record {self.extent.length} bytes on")
