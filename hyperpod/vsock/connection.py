"""One client of the hybrid socket: the handshake line, and bytes between its socket and a stream."""

from __future__ import annotations

import asyncio
import enum
import re
import select
import socket
from collections.abc import Callable

from hyperpod.wire.vsock.stream import Stream

_LINE = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n")
_LONGEST_LINE = 32
_MAX_PORT = 0xFFFFFFFE  # 0xFFFFFFFF is VMADDR_PORT_ANY

# Edge-triggered: one epoll_ctl per connection instead of one per pause. EPOLLHUP is always watched, so that a
# client's close is seen while nothing is read from it.
WATCH_IN = select.EPOLLIN | select.EPOLLET
WATCH_BOTH = WATCH_IN | select.EPOLLOUT


class Phase(enum.Enum):
    HANDSHAKE = enum.auto()  # no complete CONNECT line yet
    REQUESTED = enum.auto()  # the guest has not answered yet
    OPEN = enum.auto()
    DRAINING = enum.auto()  # the guest is through; the client has not taken everything yet
    CLOSED = enum.auto()


class BadHandshake(Exception):
    """The client did not speak the CONNECT convention; it is closed without an answer."""


class Connection:
    """State beside the stream's: what the client's socket can do, and what waits for it."""

    __slots__ = (
        "_set_mask",
        "backlog",
        "burst",
        "credit_queued",
        "deadline",
        "fd",
        "host_eof",
        "host_gone",
        "in_ready",
        "phase",
        "progress",
        "readable",
        "slot",
        "sock",
        "stream",
        "write_end",
    )

    def __init__(self, sock: socket.socket, set_mask: Callable[[int, int], None]) -> None:
        """`set_mask(fd, epoll mask)` changes what is watched."""
        self.sock, self.fd = sock, sock.fileno()
        self._set_mask = set_mask
        self.phase = Phase.HANDSHAKE
        self.stream: Stream | None = None
        self.slot = -1  # in the journal
        self.backlog = bytearray()  # from the guest, not taken by the client yet; bounded by buf_alloc
        self.readable = False  # until a read says otherwise
        self.in_ready = False  # queued in the switch
        self.credit_queued = False
        self.burst = 1  # receive buffers to fill with one read; grows while reads fill them
        self.host_eof = False  # the client sends no more
        self.host_gone = False  # the client is closed
        self.write_end = False  # shut down the client's reading side once the backlog is empty
        self.progress = 0  # unacknowledged bytes when the linger timer was set
        self.deadline: asyncio.TimerHandle | None = None

    def read_line(self) -> int | None:
        """The port of the CONNECT line, None while it is incomplete. Raises BadHandshake.

        Takes nothing beyond the line: what follows it belongs to the stream.
        """
        try:
            seen = self.sock.recv(_LONGEST_LINE, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise BadHandshake(str(exc)) from exc
        end = seen.find(b"\n") + 1
        if not end:
            if not seen or len(seen) == _LONGEST_LINE or self.host_gone:
                raise BadHandshake("no CONNECT line")
            return None
        match = _LINE.fullmatch(seen, 0, end)
        if match is None or int(match[1]) > _MAX_PORT:
            raise BadHandshake("malformed CONNECT line")
        self.sock.recv(end)
        return int(match[1])

    def write(self, pieces: list[memoryview], length: int) -> int:
        """Give the client `length` bytes, keep what it does not take. Returns how many are handed on."""
        if self.host_gone:
            return length
        done = 0
        if not self.backlog:
            try:
                done = self.sock.send(pieces[0]) if len(pieces) == 1 else self.sock.sendmsg(pieces)
            except BlockingIOError:
                pass
            except OSError:  # the client is gone or reads no more: what is left is dropped
                return length
            if done == length:
                return length
            self._set_mask(self.fd, WATCH_BOTH)
        skip = done
        for piece in pieces:
            if skip < len(piece):
                self.backlog += piece[skip:] if skip else piece
                skip = 0
            else:
                skip -= len(piece)
        return done

    def flush(self) -> int:
        """Write what waits. Returns how many bytes are off our hands."""
        if not self.backlog:
            return 0
        try:
            done = self.sock.send(self.backlog)
        except BlockingIOError:
            return 0
        except OSError:
            done = len(self.backlog)
        del self.backlog[:done]
        if not self.backlog:
            self._set_mask(self.fd, WATCH_IN)
            if self.write_end:
                self.end_writing()
        return done

    def end_writing(self) -> None:
        """Show the client the end of the guest's bytes, after the backlog."""
        self.write_end = True
        if not self.backlog:
            self._shutdown(socket.SHUT_WR)

    def end_reading(self) -> None:
        """The guest takes no more: the client's writes fail from here on."""
        self.host_eof = True
        self._shutdown(socket.SHUT_RD)

    def _shutdown(self, how: int) -> None:
        try:
            self.sock.shutdown(how)
        except OSError:
            self.host_gone = True

    def cancel_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
