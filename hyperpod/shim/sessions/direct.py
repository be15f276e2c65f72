"""Streams that an agent on this host hands over: the pipe's or the socket's descriptor instead of frames.

Nobody but the shim is then between a process and its client. The agent keeps a copy of a pipe's end, so that a shim
that dies leaves nobody with a broken pipe, and takes over again when the connection ends that the pipe came on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Iterable

from hyperpod.errors import ProtocolError
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.socket import CHUNK, Buffer, StreamSocket, Turns, drop_sent, first_batch, resolve


class AgentSocket(StreamSocket):
    """A connection to the agent of this host, whose answer may bring a descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._descriptor = -1

    def _receive(self) -> bytes:
        data, fds, _, _ = socket.recv_fds(self._sock, CHUNK, 1)
        if fds:
            os.set_inheritable(fds[0], False)  # recv_fds takes flags, and forgets them
            self._forget()
            self._descriptor = fds[0]
        return data

    def take(self) -> int:
        """The descriptor, from now on the caller's. Raises ProtocolError when none has come."""
        if self._descriptor < 0:
            raise ProtocolError("stdio: HANDOVER without a descriptor")
        fd, self._descriptor = self._descriptor, -1
        return fd

    def close(self) -> None:
        super().close()
        self._forget()

    def _forget(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


async def connect(dialer: AgentDialer) -> tuple[StreamSocket, bytes]:
    """As `AgentDialer.open`."""
    sock, data = await dialer.open()
    return (AgentSocket if dialer.direct else StreamSocket)(sock), data


def taken(link: StreamSocket) -> int:
    """What came with HANDOVER. Raises ProtocolError."""
    if not isinstance(link, AgentSocket):
        raise ProtocolError("stdio: HANDOVER by a guest")
    return link.take()


class PipeEnd:
    """One end of a pipe, for one task. Its other users have made it non-blocking."""

    def __init__(self, fd: int) -> None:
        self._fd, self._loop = fd, asyncio.get_running_loop()
        self._waiter: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._grace = 0.0
        self._turns = Turns()

    def __enter__(self) -> PipeEnd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def read(self) -> bytes:
        """The next bytes; empty when all who write have closed it, or after the silence of `end_when_idle`."""
        await self._turns.take()
        while True:
            with contextlib.suppress(BlockingIOError):
                return os.read(self._fd, CHUNK)
            self._waiter = waiter = self._loop.create_future()
            self._loop.add_reader(self._fd, resolve, waiter, True)
            self._start_clock()
            try:
                if not await waiter:
                    return b""
            finally:
                self._waiter = None
                self._stop_clock()
                self._loop.remove_reader(self._fd)

    def end_when_idle(self, grace: float) -> None:
        """The process has ended, others may hold the pipe: `read` waits no longer than so many seconds."""
        self._grace = grace
        self._start_clock()

    def _start_clock(self) -> None:
        if self._grace and self._waiter is not None:
            self._stop_clock()
            self._timer = self._loop.call_later(self._grace, resolve, self._waiter, False)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def write(self, buffers: Iterable[Buffer]) -> None:
        """All of them. Raises OSError: nobody reads any more."""
        queue = deque(buffers)
        while queue:
            try:
                sent = os.writev(self._fd, first_batch(queue))
            except BlockingIOError:
                waiter: asyncio.Future[bool] = self._loop.create_future()
                self._loop.add_writer(self._fd, resolve, waiter, True)
                try:
                    await waiter
                finally:
                    self._loop.remove_writer(self._fd)
            else:
                drop_sent(queue, sent)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
