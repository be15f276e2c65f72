"""A stream socket for relays: writes from a queue of buffers, none of which is copied; bounded by `drain`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import select
import socket
import sys
import termios
from collections import deque
from collections.abc import Awaitable, Iterable

Buffer = bytes | bytearray | memoryview

CHUNK = 256 * 1024
"""Bytes read at once."""
HIGH_WATER = 512 * 1024
"""Bytes queued before `drain` waits."""
_HOPELESS = 4 * 1024 * 1024
"""Bytes queued that no waiting relay can have caused: the peer makes us answer and does not read."""
_BATCH = 64
"""Buffers for one sendmsg(2); Linux takes 1024, but a socket's room is used up long before."""
_LINGER = 5.0
_LOOK, _BLINK = 1.0, 0.005
_TURN = 2
"""Reads without a wait, of CHUNK at most, before everybody else has a turn."""


def resolve(waiter: asyncio.Future[bool], value: bool) -> None:
    """For whoever may be called twice."""
    if not waiter.done():
        waiter.set_result(value)


def first_batch(queue: deque[Buffer]) -> list[Buffer]:
    """What one gathering write takes."""
    return [queue[i] for i in range(min(len(queue), _BATCH))]


def drop_sent(queue: deque[Buffer], count: int) -> None:
    """So many bytes of the queue have been written."""
    while count:
        buffer = queue.popleft()
        if count < len(buffer):
            queue.appendleft(memoryview(buffer)[count:])
            return
        count -= len(buffer)


def under_way(fd: int) -> int:
    """Bytes written that the other side's kernel does not have yet; of a UNIX socket, that nobody has read."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


class Turns:
    """A reader that always finds something must not keep the loop from everybody else."""

    def __init__(self) -> None:
        self._taken = 0

    async def take(self) -> None:
        self._taken += 1
        if self._taken % _TURN == 0:
            await asyncio.sleep(0)


class StreamSocket:
    """Owns a connected socket. One reader; any number of tasks may write and drain."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock, self._loop = sock, asyncio.get_running_loop()
        self._queue: deque[Buffer] = deque()
        self._queued = 0
        self._writing = False
        self._failure: OSError | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._turns = Turns()
        self.active = self._loop.time()
        """When bytes last went either way, loop time."""

    async def receive(self) -> bytes:
        """The next bytes, empty at the end. Raises OSError."""
        await self._turns.take()
        while True:
            with contextlib.suppress(BlockingIOError):
                data = self._receive()
                self.active = self._loop.time()
                return data
            await self._readable()

    def _receive(self) -> bytes:
        """Raises OSError, BlockingIOError."""
        return self._sock.recv(CHUNK)

    async def _readable(self) -> None:
        fd, waiter = self._sock.fileno(), self._loop.create_future()
        self._loop.add_reader(fd, resolve, waiter, True)
        try:
            await waiter
        finally:
            if self._sock.fileno() == fd:  # else it is somebody else's by now
                self._loop.remove_reader(fd)

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Queue, and send what the socket takes now. Of a socket that has failed, `drain` tells."""
        for buffer in buffers:
            if length := len(buffer):
                self._queue.append(buffer)
                self._queued += length
        if not self._writing:
            self._flush()
        if self._queued > _HOPELESS:
            self._fail(ConnectionAbortedError(errno.ECONNABORTED, "the client does not read"))

    async def drain(self, below: int = HIGH_WATER) -> None:
        """Wait until at most `below` bytes are queued. Raises OSError."""
        while self._failure is None and self._queued > below:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
        if self._failure is not None:
            raise self._failure

    async def hold(self, until: Awaitable[object]) -> None:
        """Wait for something before more is read. Raises ConnectionResetError when the peer goes meanwhile."""
        task = asyncio.ensure_future(until)
        try:
            while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
                if self._hung_up():
                    raise ConnectionResetError("the client went away")
            await task
        finally:
            task.cancel()

    def _hung_up(self) -> bool:
        """Nobody reads, so nobody would notice."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    async def delivered(self) -> None:
        """Wait until the peer's kernel has everything: what is under way at a close is lost to a peer that still
        sends something, as clients' pings are, since that is answered by a reset. Raises OSError."""
        pause = _BLINK
        while True:
            await self.drain(0)
            if not under_way(self._sock.fileno()):
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LOOK)

    async def shut(self) -> None:
        """Everything out, and then the end of this direction. Raises OSError."""
        await self.drain(0)
        self._sock.shutdown(socket.SHUT_WR)

    async def finish(self) -> None:
        """Everything out, then wait for the other side to go first: a reset would destroy what it has not read yet.
        It has a little while for both."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LINGER):
                await self.shut()
                while await self._loop.sock_recv(self._sock, CHUNK):
                    pass

    def close(self) -> None:
        """Also while somebody reads, who then never hears of it."""
        self._fail(ConnectionAbortedError(errno.ECONNABORTED, "closed"))
        if self._sock.fileno() >= 0:
            # A watch that outlived its descriptor would hit the next one with the same number.
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _flush(self) -> None:
        queue = self._queue
        while queue:
            try:
                sent = self._sock.sendmsg(first_batch(queue))
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._sock.fileno(), self._flush)
                break
            except OSError as exc:
                self._fail(exc)
                return
            self.active = self._loop.time()
            self._queued -= sent
            drop_sent(queue, sent)
        else:
            self._stop_writing()
        self._wake()

    def _fail(self, exc: OSError) -> None:
        self._failure = self._failure or exc
        self._queue.clear()
        self._queued = 0
        self._stop_writing()
        self._wake()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
