"""The served side of a control socket: root's (and our own user's) requests, each in a task of its own."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hyperpod.errors import HyperpodError, ProtocolError, Unavailable
from hyperpod.shim import packets
from hyperpod.shim.channel import Channel
from hyperpod.tasks import TaskOwner
from hyperpod.wire.control import Request, decode_request, encode_error, encode_reply

log = logging.getLogger(__name__)

Handler = Callable[[Request, list[int]], Awaitable[dict[str, Any]]]
"""Answers one request. It takes the descriptors that it keeps out of the list; the rest is closed for it."""

_BACKLOG = 16
_PAUSE = 0.2
"""Seconds without accepting, when there are no descriptors left."""
_CONNECTIONS = 32
_REQUESTS = 256
"""At once, over all connections; what comes beyond waits in the sockets."""


class ControlServer:
    """Listens on `path`, which is replaced if a dead predecessor left it."""

    def __init__(self, path: str, handler: Handler) -> None:
        """Raises OSError."""
        self._path, self._handler = path, handler
        self._connections = TaskOwner("control", limit=_CONNECTIONS)
        self._requests = TaskOwner("request", limit=2 * _REQUESTS)
        self._room = asyncio.Semaphore(_REQUESTS)
        self._loop = asyncio.get_running_loop()
        Path(path).unlink(missing_ok=True)
        self._sock = packets.seqpacket()
        try:
            self._sock.bind(path)
            self._sock.listen(_BACKLOG)
        except OSError:
            self._sock.close()
            raise
        self._pause: asyncio.TimerHandle | None = None
        self._watch()

    def _watch(self) -> None:
        self._loop.add_reader(self._sock.fileno(), self._accept)

    async def close(self) -> None:
        """Stop, end all requests, remove the socket."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        await self._connections.close()
        await self._requests.close()
        Path(self._path).unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as exc:
            log.warning("accept on %s: %s", self._path, exc)
            self._loop.remove_reader(self._sock.fileno())
            self._pause = self._loop.call_later(_PAUSE, self._watch)
            return
        who = packets.peer(sock)
        if who.uid not in (0, os.geteuid()) or len(self._connections) >= _CONNECTIONS:
            log.warning("refused a control connection of pid %d, uid %d", who.pid, who.uid)
            sock.close()
            return
        sock.setblocking(False)
        self._connections.spawn(f"pid-{who.pid}", self._serve(Channel(sock)))

    async def _serve(self, channel: Channel) -> None:
        try:
            while True:
                data, fds = await channel.receive()
                if not data:
                    packets.close_all(fds)
                    return
                try:
                    request = decode_request(data)
                except ProtocolError:
                    packets.close_all(fds)
                    raise
                await self._room.acquire()
                self._requests.spawn(request.op, self._answer(channel, request, fds))
        except (ProtocolError, Unavailable) as exc:
            log.warning("control connection ended: %s", exc)
        finally:
            channel.close()

    async def _answer(self, channel: Channel, request: Request, fds: list[int]) -> None:
        try:
            try:
                reply = encode_reply(request.id, await self._handler(request, fds))
            except HyperpodError as exc:
                reply = encode_error(request.id, exc)
            except OSError as exc:
                reply = encode_error(request.id, HyperpodError(f"{request.op}: {exc}"))
            if request.id:
                await channel.send(reply)
        except Unavailable:
            log.info("nobody waits for the reply to %s any more", request.op)
        finally:
            packets.close_all(fds)
            self._room.release()
