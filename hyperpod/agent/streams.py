"""The standard streams of one process: pipes (or a terminal) on one side, a stdio connection on the other.

Output is read only while less than the window is unacknowledged, so a container that prints faster than the
host logs is held up by its pipe; nothing is dropped. A stream outlives its connections and its process, until
its owner forgets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from typing import Protocol

from hyperpod.wire.stdio import WINDOW, Frame, Open, encode_handover, encode_opened
from hyperpod.wire.stdioends import AgentSender, StdinReceiver


class Peer(Protocol):
    """What a stream needs of the connection that it is attached to."""

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Queue bytes."""

    @property
    def writable(self) -> bool:
        """False while the peer reads slower than we send."""

    def hold(self, held: bool) -> None:
        """Read nothing more from the peer while held."""

    def drop(self, why: str) -> None:
        """Send an error and close."""

    def finish(self) -> None:
        """Close, once everything is sent."""

    def send_with(self, frame: bytes, fd: int) -> bool:
        """Send the first frame together with a descriptor; false (nothing was sent) where that cannot be done."""


class Stream(Protocol):
    """What a stdio connection speaks to."""

    def attach(self, peer: Peer, what: Open) -> None:
        """The connection is there. Raises ProtocolError."""

    def detach(self, peer: Peer) -> None:
        """It is gone."""

    def receive(self, frame: Frame) -> None:
        """A frame of the peer. Raises ProtocolError."""

    def flush(self) -> None:
        """The peer takes data again."""


def _is_pipe(fd: int) -> bool:
    return fd >= 0 and stat.S_ISFIFO(os.fstat(fd).st_mode)


class OutputStream:
    """stdout or stderr of a process (of a terminal: its only output)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sender = AgentSender()
        self._fd = -1
        self._reading = False
        self._lent = False
        """The peer reads the pipe itself."""
        self._close_fd: Callable[[], None] = lambda: None
        self._peer: Peer | None = None
        self.ended = asyncio.Event()
        """All output was read (not: acknowledged)."""
        self._discarding = False
        self._grace = 0.0
        self._idle: asyncio.TimerHandle | None = None

    def start(self, fd: int, close: Callable[[], None]) -> None:
        """Begin to read from the non-blocking `fd`; `close` is called once, when it is done with."""
        self._fd, self._close_fd = fd, close
        self._pump()

    def attach(self, peer: Peer, what: Open) -> None:
        """Send to `peer` from here on; an older one is dropped. Raises ProtocolError for a wrong offset."""
        opened = self._sender.attach(what.from_offset)
        older, self._peer = self._peer, peer
        if older is not None:
            older.drop("the stream was opened by a newer connection")
        self._lent = what.direct and _is_pipe(self._fd) and peer.send_with(opened, self._fd)
        if not self._lent:
            peer.send([opened])
        self.flush()
        if self._lent:
            peer.send([encode_handover(self._sender.end)])
        self._pump()

    def detach(self, peer: Peer) -> None:
        if self._peer is peer:
            self._peer = None
            self._sender.detach()
            if self._lent:
                self._lent = False
                self._pump()

    def receive(self, frame: Frame) -> None:
        """An ACK of the peer. Raises ProtocolError."""
        self._sender.receive(frame)
        self._pump()

    def flush(self) -> None:
        """Send what there is, if the peer takes it."""
        if self._peer is not None and self._peer.writable and (buffers := self._sender.take()):
            self._peer.send(buffers)

    def discard(self) -> None:
        """Read on into nothing; a connected peer is dropped."""
        peer, self._peer, self._lent = self._peer, None, False
        if peer is not None:
            self._sender.detach()
            peer.drop("the process was hung up")
        self._discarding = True
        self._pump()

    def _pump(self) -> None:
        """Read while there is room, stop when there is none."""
        wanted = self._fd >= 0 and not self._lent and (self._discarding or self._sender.room > 0)
        if wanted and not self._reading:
            self._loop.add_reader(self._fd, self._readable)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._fd)
        self._reading = wanted
        if self._grace:
            self._await_silence()

    def end_when_idle(self, grace: float) -> None:
        """The process has ended: so does its stream once nothing has come for `grace` seconds, though another
        process may hold the pipe. While the peer is too slow for reading, or reads itself, no time passes."""
        self._grace = grace
        self._await_silence()

    def _await_silence(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = self._loop.call_later(self._grace, self._end) if self._reading else None

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, WINDOW if self._discarding else self._sender.room)
        except BlockingIOError:
            return
        except OSError:  # EIO: the other side of a terminal is closed
            data = b""
        if not data:
            self._end()
            return
        if not self._discarding:
            self._sender.feed(data)
            self.flush()
        self._pump()

    def _end(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._reading:
            self._loop.remove_reader(self._fd)
            self._reading = False
        if self._fd >= 0:
            self._fd = -1
            self._close_fd()
        if not self.ended.is_set():
            self._sender.finish()
            self.ended.set()
            self.flush()

    def close(self) -> None:
        """Forget everything; a connected peer is dropped."""
        peer, self._peer = self._peer, None
        self._end()
        if peer is not None:
            peer.drop("the process was removed")


class InputStream:
    """stdin of a process. Each connection starts at offset 0; what was accepted is written, whoever sent it."""

    def __init__(self, *, ends_with_peer: bool, eof_closes: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends_with_peer, self._eof_closes = ends_with_peer, eof_closes
        self._pending = bytearray()
        self._receiver = StdinReceiver()
        self._fd = -1
        self._writing = False
        self._close_fd: Callable[[], None] = lambda: None
        self._peer: Peer | None = None
        self._eof = self._over = self._held = False

    def start(self, fd: int, close: Callable[[], None]) -> None:
        """Write into the non-blocking `fd`; `close` is called once, when it is done with."""
        self._fd, self._close_fd = fd, close
        self._write()

    def attach(self, peer: Peer, what: Open) -> None:
        """Take input from `peer`, or let it write itself; an older one is dropped."""
        older, self._peer = self._peer, peer
        if older is not None:
            older.drop("the stream was opened by a newer connection")
        self._receiver = StdinReceiver()
        opened, free = encode_opened(0), not self._pending and not self._eof and _is_pipe(self._fd)
        if not (what.direct and free and peer.send_with(opened + encode_handover(0), self._fd)):
            peer.send([opened])
        self._held = False
        self._hold()

    def detach(self, peer: Peer) -> None:
        if self._peer is peer:
            self._peer = None
            if self._ends_with_peer:
                self._eof = True
                self._write()

    def flush(self) -> None:
        """There is never much to send."""

    def receive(self, frame: Frame) -> None:
        """DATA or EOF of the peer. Raises ProtocolError: also for more than the window unwritten."""
        payload = self._receiver.receive(frame)
        if self._receiver.eof:
            self._eof = self._eof or self._eof_closes
        elif not self._over and not self._eof:
            self._pending += payload
        self._write()

    def _write(self) -> None:
        if self._fd >= 0:
            try:
                while self._pending:
                    del self._pending[: os.write(self._fd, self._pending)]
            except BlockingIOError:
                pass
            except OSError:  # nobody reads any more: what comes is consumed all the same
                self.close_pipe()
        wanted = self._fd >= 0 and bool(self._pending)
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._loop.add_writer(self._fd, self._write)
            else:
                self._loop.remove_writer(self._fd)
        self._acknowledge()
        self._hold()
        if self._eof and not self._pending and self._fd >= 0:
            self.close_pipe()

    def _hold(self) -> None:
        """A connection takes no more than a window unwritten; what earlier ones have left is not to add up."""
        full = len(self._pending) > WINDOW
        if self._peer is not None and full is not self._held:
            self._held = full
            self._peer.hold(full)

    def _acknowledge(self) -> None:
        """Of this connection's bytes all but those still pending; older connections' are in front of them."""
        receiver = self._receiver
        written = receiver.offset - min(len(self._pending), receiver.offset)
        if self._peer is not None and written > receiver.acked:
            self._peer.send([receiver.ack(written)])

    def close_pipe(self) -> None:
        """The process sees the end of its input; later input is dropped and acknowledged."""
        self._over = True
        self._pending.clear()
        if self._writing:
            self._loop.remove_writer(self._fd)
            self._writing = False
        if self._fd >= 0:
            self._fd = -1
            self._close_fd()
        self._acknowledge()
        self._hold()

    def close(self) -> None:
        """Forget everything; a connected peer is dropped."""
        peer, self._peer = self._peer, None
        self.close_pipe()
        if peer is not None:
            peer.drop("the process was removed")


class Terminal:
    """The master side of a pseudo terminal, shared by input and output; closed when both are done with it."""

    def __init__(self, fd: int) -> None:
        self.fd, self._users = fd, 0

    def use(self) -> Callable[[], None]:
        """One more user; call the result once to end it."""
        self._users += 1
        return self._release

    def _release(self) -> None:
        self._users -= 1
        if self._users == 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)
