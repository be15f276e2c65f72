"""One container's CRI log file and its cursor: records in, exactly once, over crashes and full disks.

Every method blocks on the disk: call them in a thread, one at a time per container. After a failed `write` the
rest waits in here; `flush` tries again, and a `reopen` in between moves the rest to the new file. The log never
ends in half a record for longer than one call.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Sequence

from hyperpod.errors import FailedPrecondition, ProtocolError
from hyperpod.shim.cursor import Cursor, CursorFile
from hyperpod.wire.crilog import RecordScanner

log = logging.getLogger(__name__)

_SCAN_CHUNK = 1024 * 1024
_IOV_MAX = 512


class LogFile:
    """Owns the log's descriptor (None: output is dropped) and the cursor file."""

    def __init__(self, cursor_path: str, fd: int | None, inherited: int | None = None) -> None:
        """`fd` is the log to write to, opened read-write and O_APPEND; `inherited` the one that a dead
        predecessor wrote to, if known. Both are owned from here on, also when this raises.

        Resumes from the cursor: half a record at the end is cut, whole records behind it are counted. Raises
        OSError; FailedPrecondition for a descriptor that cannot be read back.
        """
        self._fd: int | None = None
        self._pending: list[bytes] = []
        self._targets: dict[str, int] = {}
        try:
            self._file = CursorFile(cursor_path)
            known = self._file.load()
            self.cursor = known or Cursor()
            for candidate in (inherited, fd):
                if candidate is not None and known is not None and _same(candidate, known):
                    self._recover(candidate)
                    break
            if fd is not None:
                _check_mode(fd)
            self._switch(fd)
            fd = None
        finally:
            for leftover in (fd, inherited):
                if leftover is not None:
                    os.close(leftover)

    @property
    def fd(self) -> int | None:
        return self._fd

    def offset(self, stream: str) -> int:
        """What is written, or at least taken over, of the stream."""
        return self._targets.get(stream, self.cursor.offset(stream))

    def write(self, stream: str, offset: int, records: Sequence[bytes]) -> None:
        """Append `records`, after which the stream is written up to `offset`. Raises OSError: see `flush`."""
        if self._fd is not None:
            self._pending += filter(None, records)
        self._targets[stream] = offset
        self.flush()

    def flush(self) -> None:
        """Write what is left of the last batch. Raises OSError when it still does not fit; nothing is lost."""
        while self._pending:
            self._append()
        for stream, offset in self._targets.items():
            self.cursor.set_offset(stream, offset)
        self._targets.clear()
        self._file.save(self.cursor)

    def end(self, stream: str) -> None:
        """Note the stream's EOF; its data is written."""
        self.cursor.set_ended(stream)
        self._file.save(self.cursor)

    def add_gap(self, count: int) -> None:
        """Bytes that will never come; saved with the next write."""
        self.cursor.gap_bytes += count

    def reopen(self, fd: int) -> None:
        """All later writes go to `fd`, which is owned from here on. Raises as the constructor does."""
        try:
            _check_mode(fd)
            old = self._fd
            self._switch(fd)
        except BaseException:
            os.close(fd)
            raise
        if old is not None:
            os.close(old)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._file.close()

    def _switch(self, fd: int | None) -> None:
        cursor = self.cursor
        if fd is None:
            cursor.log_device = cursor.log_inode = cursor.log_length = 0
        else:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != (cursor.log_device, cursor.log_inode):
                _end_line(fd, status.st_size)
                cursor.log_length = os.fstat(fd).st_size
            cursor.log_device, cursor.log_inode = status.st_dev, status.st_ino
        self._file.save(cursor)
        self._fd = fd

    def _append(self) -> None:
        assert self._fd is not None
        batch = self._pending[:_IOV_MAX]
        total = sum(map(len, batch))
        written = os.writev(self._fd, batch)
        if written == total:
            del self._pending[:_IOV_MAX]
            self.cursor.log_length += total
            return
        # The disk is full, within a record. Cut back to the last whole one, count those, keep the rest.
        whole = b"".join(self._pending)
        keep = whole.rfind(b"\n", 0, written) + 1
        # Not by our own count: whoever has cut the log meanwhile would get it back, filled with zeros.
        os.ftruncate(self._fd, os.fstat(self._fd).st_size - written + keep)
        scanner = RecordScanner()
        scanner.feed(whole[:keep])
        self._pending = [whole[keep:]]
        self._count(scanner)
        self._file.save(self.cursor)
        if not keep:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _count(self, scanner: RecordScanner) -> None:
        cursor, extent = self.cursor, scanner.extent
        cursor.log_length += extent.length
        cursor.stdout += extent.stdout
        cursor.stderr += extent.stderr

    def _recover(self, fd: int) -> None:
        """Bring the cursor up to what the file holds, and the file to its last whole record."""
        cursor = self.cursor
        size = os.fstat(fd).st_size
        if size < cursor.log_length:
            log.warning("a log was cut by somebody else, from %d to %d bytes", cursor.log_length, size)
            cursor.log_length = size
        _check_mode(fd)
        scanner, position = RecordScanner(), cursor.log_length
        try:
            while data := os.pread(fd, _SCAN_CHUNK, position):
                position += len(data)
                scanner.feed(data)
        except ProtocolError as exc:
            # Not ours to cut. What came after our last batch cannot be told from it: it may come twice.
            log.error("a log was written to by somebody else: %s", exc)
            _end_line(fd, size)
            cursor.log_length = os.fstat(fd).st_size
        else:
            self._count(scanner)
            if cursor.log_length < size:
                os.ftruncate(fd, cursor.log_length)
        self._file.save(cursor)


def _same(fd: int, cursor: Cursor) -> bool:
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino) == (cursor.log_device, cursor.log_inode)


def _check_mode(fd: int) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE != os.O_RDWR or not flags & os.O_APPEND:
        raise FailedPrecondition(
            "a log's descriptor must be opened O_RDWR | O_APPEND: recovery reads it back"
        )


def _end_line(fd: int, size: int) -> None:
    """Somebody else's file: records start on a line of their own."""
    if size and os.pread(fd, 1, size - 1) != b"\n":
        os.write(fd, b"\n")
