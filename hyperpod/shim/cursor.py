"""Where a container's log stands: a small file that survives the shim, written after every batch.

Two slots, written in turn, each with a sequence number and a checksum: a slot that was being written when the
process (or the host) died leaves the other one valid.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass

_SLOT = struct.Struct("<4sQQQQQQQBI")
_MAGIC = b"HPC1"
_SPACING = 512
"""Bytes from slot to slot: a sector each."""
_ENDED = {"stdout": 1, "stderr": 2}


@dataclass
class Cursor:
    """`log_*`: the file, and its length up to which the offsets below are written in it.

    A log of device 0 and inode 0 is none: what comes is dropped.
    """

    log_device: int = 0
    log_inode: int = 0
    log_length: int = 0
    stdout: int = 0
    stderr: int = 0
    gap_bytes: int = 0
    """Of both streams: bytes that the agent had no longer."""
    ended: int = 0
    """Bit set of streams whose EOF was reached."""

    def offset(self, stream: str) -> int:
        return self.stdout if stream == "stdout" else self.stderr

    def set_offset(self, stream: str, offset: int) -> None:
        if stream == "stdout":
            self.stdout = offset
        else:
            self.stderr = offset

    def has_ended(self, stream: str) -> bool:
        return bool(self.ended & _ENDED[stream])

    def set_ended(self, stream: str) -> None:
        self.ended |= _ENDED[stream]


class CursorFile:
    """Blocking, but of a few microseconds: one small write into the page cache."""

    def __init__(self, path: str) -> None:
        """Open or make it. Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._sequence = 0

    def load(self) -> Cursor | None:
        """The newest valid slot, None when there is none."""
        best: Cursor | None = None
        for place in (0, _SPACING):
            raw = os.pread(self._fd, _SLOT.size, place)
            if len(raw) < _SLOT.size:
                continue
            magic, sequence, *values, checksum = _SLOT.unpack(raw)
            if magic == _MAGIC and checksum == zlib.crc32(raw[:-4]) and sequence > self._sequence:
                self._sequence = sequence
                best = Cursor(*values)
        return best

    def save(self, cursor: Cursor) -> None:
        """Raises OSError."""
        sequence = self._sequence + 1
        body = _SLOT.pack(
            _MAGIC,
            sequence,
            cursor.log_device,
            cursor.log_inode,
            cursor.log_length,
            cursor.stdout,
            cursor.stderr,
            cursor.gap_bytes,
            cursor.ended,
            0,
        )[:-4]
        os.pwrite(self._fd, body + struct.pack("<I", zlib.crc32(body)), sequence % 2 * _SPACING)
        self._sequence = sequence

    def close(self) -> None:
        os.close(self._fd)
