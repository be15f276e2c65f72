"""The calling side of a control socket: requests with deadlines, replies matched by id."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from hyperpod.errors import DeadlineExceeded, ProtocolError, Unavailable
from hyperpod.shim import packets
from hyperpod.shim.channel import Channel
from hyperpod.tasks import TaskOwner
from hyperpod.wire.control import Reply, decode_reply, encode_request

log = logging.getLogger(__name__)

_BACKLOG_RETRY = 0.01


class ControlCaller:
    """One connection to a control socket at `path`; `name` is what errors call the other side.

    `uid`: whose the other side must be; None for anybody's, where the path itself is proof enough."""

    def __init__(self, path: str, name: str, uid: int | None = None) -> None:
        self.path, self.name, self._uid = path, name, uid
        self.closed = asyncio.Event()
        """Set once the connection is lost or closed."""
        self._channel: Channel | None = None
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._ids = itertools.count(1)
        self._tasks = TaskOwner(f"caller/{name}", limit=1)

    async def connect(self, timeout: float) -> None:
        """Raises Unavailable when nobody listens or somebody else, DeadlineExceeded when its backlog stays full."""
        sock = packets.seqpacket()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        sock.connect(self.path)
                        break
                    except BlockingIOError:  # the backlog is full
                        await asyncio.sleep(_BACKLOG_RETRY)
            if self._uid is not None and (owner := packets.peer(sock).uid) != self._uid:
                raise Unavailable(
                    f"{self.path} is answered by uid {owner}, not by {self.name}, uid {self._uid}"
                )
        except TimeoutError as exc:
            sock.close()
            raise DeadlineExceeded(f"{self.name} accepts no connection within {timeout:g} s") from exc
        except OSError as exc:
            sock.close()
            raise Unavailable(f"{self.name} does not listen on {self.path}: {exc.strerror}") from exc
        except BaseException:
            sock.close()
            raise
        self._channel = Channel(sock)
        self._tasks.spawn("replies", self._read(self._channel))

    async def call(
        self, op: str, args: dict[str, Any] | None = None, fds: Sequence[int] = (), *, timeout: float
    ) -> dict[str, Any]:
        """Send one request and wait for its reply; `fds` stay the caller's.

        Raises what the other side raised; Unavailable when it goes away; DeadlineExceeded.
        """
        channel, ident = self._channel, next(self._ids)
        if channel is None or self.closed.is_set():
            raise Unavailable(f"{self.name} is not connected")
        waiter: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[ident] = waiter
        try:
            async with asyncio.timeout(timeout):
                await channel.send(encode_request(ident, op, args or {}), fds)
                reply = await waiter
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{self.name} did not answer {op} within {timeout:g} s") from exc
        finally:
            self._waiting.pop(ident, None)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # retrieved, also when the caller is cancelled
        if reply.error is not None:
            raise reply.error
        return reply.fields

    async def close(self) -> None:
        """Disconnect; waiting calls get Unavailable."""
        await self._tasks.close()
        self._lost()

    async def _read(self, channel: Channel) -> None:
        try:
            while True:
                data, fds = await channel.receive()
                packets.close_all(fds)  # no reply carries any
                if not data:
                    return
                reply = decode_reply(data)
                waiter = self._waiting.get(reply.id)
                if waiter is not None and not waiter.done():
                    waiter.set_result(reply)
                await asyncio.sleep(0)  # who sends without end must not have the loop to itself
        except (ProtocolError, Unavailable) as exc:
            log.error("%s: %s", self.name, exc)
        finally:
            self._lost()

    def _lost(self) -> None:
        self.closed.set()
        if self._channel is not None:
            self._channel.close()
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(Unavailable(f"{self.name} went away"))
