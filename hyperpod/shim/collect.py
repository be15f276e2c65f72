"""Relays what an exec prints, as records on a stream socket of the daemon's, up to a limit.

record   kind u8, length u32 big-endian, data
kind     1 stdout, 2 stderr, 3 complete (end), 4 failed (end; data is the reason), 5 truncated: no more data
         follows, but an end does
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct

from hyperpod.errors import DeadlineExceeded, GuestError, HyperpodError, Unavailable
from hyperpod.logs import printable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.socket import Turns
from hyperpod.wire.stdio import ACK_EVERY, Open
from hyperpod.wire.stdioends import HostReader

log = logging.getLogger(__name__)

STDOUT, STDERR, END, FAILED, TRUNCATED = 1, 2, 3, 4, 5
_HEADER = struct.Struct("!BI")
_CHUNK = 128 * 1024
_MAX_REASON = 2048
_ATTEMPTS = 4
"""To reach the agent; each may take the dialer's time."""

_PAUSE = 0.5
"""Seconds between them."""


class Collector:
    """One exec's relay. Owns the socket; `run` it as a task, it ends with the exec's output or the socket."""

    def __init__(
        self, dialer: AgentDialer, sock: socket.socket, container: str, exec_id: str, *, tty: bool, limit: int
    ) -> None:
        sock.setblocking(False)
        self._dialer, self._sock, self._left = dialer, sock, limit
        self._container, self._exec_id = container, exec_id
        self._kinds = {"stdout": STDOUT} if tty else {"stdout": STDOUT, "stderr": STDERR}
        self._sending = asyncio.Lock()
        self._truncated = False

    async def run(self) -> None:
        with self._sock:
            try:
                await self._until_gone()
            except OSError as exc:
                log.info("exec %s: nobody reads its output any more: %s", self._exec_id[:12], exc.strerror)

    async def _until_gone(self) -> None:
        """Relay to the end, or until the reader closes its end."""
        loop = asyncio.get_running_loop()
        relay = asyncio.ensure_future(self._relay())
        gone = asyncio.ensure_future(loop.sock_recv(self._sock, 1))
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (relay, gone):
                task.cancel()
            results = await asyncio.gather(relay, gone, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _relay(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for stream in self._kinds:
                    group.create_task(self._stream(stream))
        except* (HyperpodError, OSError) as failures:
            reason = "; ".join(str(exc) for exc in failures.exceptions)
            await self._send(FAILED, printable(reason, _MAX_REASON).encode())
        else:
            await self._send(END)

    async def _stream(self, stream: str) -> None:
        loop = asyncio.get_running_loop()
        sock, data = await self._dial()
        with sock:
            reader = HostReader(Open(self._container, stream, self._exec_id))
            await loop.sock_sendall(sock, reader.start())
            turns = Turns()
            while True:
                for frame in reader.feed(data):
                    await self._keep(self._kinds[stream], frame.payload)
                if reader.gap_bytes:
                    raise GuestError(f"{reader.gap_bytes} bytes of {stream} are lost")
                # No more often than it must be: as long as nothing is acknowledged the next shim can have it all.
                if reader.offset - reader.acked >= ACK_EVERY or (reader.eof and reader.acked):
                    await loop.sock_sendall(sock, reader.ack(reader.offset))
                if reader.eof:
                    return
                await turns.take()
                data = await loop.sock_recv(sock, _CHUNK)
                if not data:
                    raise Unavailable(f"the connection of {stream} ended before its EOF")

    async def _dial(self) -> tuple[socket.socket, bytes]:
        """An agent without CPU answers late, or has too many that wait: the output stays there meanwhile."""
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                return await self._dialer.open()
            await asyncio.sleep(_PAUSE)
        return await self._dialer.open()

    async def _keep(self, kind: int, data: bytes | memoryview) -> None:
        """Hand on what the limit allows; the rest is drained, so that the process is not stopped by a full pipe."""
        if self._truncated:
            return
        piece = data[: self._left]
        self._left -= len(piece)
        self._truncated = len(piece) < len(data)
        if piece:
            await self._send(kind, piece)
        if self._truncated:
            await self._send(TRUNCATED)

    async def _send(self, kind: int, data: bytes | memoryview = b"") -> None:
        async with self._sending:
            header = _HEADER.pack(kind, len(data))
            await asyncio.get_running_loop().sock_sendall(self._sock, header + data)
