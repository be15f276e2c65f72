"""What a successor needs, kept by the supervisor: named states with descriptors, sent whenever they change."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from hyperpod.errors import InvalidArgument, ProtocolError, Unavailable
from hyperpod.shim import packets
from hyperpod.shim.channel import Channel
from hyperpod.tasks import TaskOwner
from hyperpod.wire.control import encode_request

log = logging.getLogger(__name__)

Export = Callable[[], tuple[dict[str, Any], list[int]]]
"""The current state and the descriptors that it refers to, which stay the exporter's."""

_FIRST_RETRY, _LAST_RETRY = 0.1, 2.0


class FdStore:
    """The shim's connection to its supervisor, made again as often as it breaks; everything is re-sent then.

    Without a `path` nothing is kept anywhere. `run` it as a task.
    """

    def __init__(self, path: str, sandbox_id: str, directory: str) -> None:
        self._path = path
        self._identity = {"sandbox_id": sandbox_id, "directory": directory}
        self._exports: dict[str, Export] = {}
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._clean = asyncio.Event()
        self._ready = False

    def keep(self, name: str, export: Export) -> None:
        """Store this from now on; call again (or `changed`) when it has changed."""
        self._exports[name] = export
        self.changed(name)

    def changed(self, name: str) -> None:
        if self._path:
            self._dirty.add(name)
            self._clean.clear()
            self._wake.set()

    def forget(self, name: str) -> None:
        if self._exports.pop(name, None) is not None:
            self.changed(name)

    def ready(self) -> None:
        """The shim listens: the supervisor tells whoever asked for it."""
        self._ready = True
        self._wake.set()

    async def flush(self, timeout: float) -> None:
        """Wait until the supervisor has all changes; not longer than `timeout`, and not when it is away."""
        if self._path:
            try:
                async with asyncio.timeout(timeout):
                    await self._clean.wait()
            except TimeoutError:
                log.warning("the supervisor does not take what a successor of this shim would need")

    async def run(self) -> None:
        delay = _FIRST_RETRY
        while self._path:
            sock = packets.seqpacket()
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
            else:
                delay = _FIRST_RETRY
                await self._session(Channel(sock))
                log.info("lost the supervisor; the sandbox goes on")
            self._clean.set()  # nobody is there to wait for
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY)

    async def _session(self, channel: Channel) -> None:
        watch = TaskOwner("fdstore", limit=1)
        lost = watch.spawn("watch", _until_end(channel))
        lost.add_done_callback(lambda _: self._wake.set())
        registered = False
        self._dirty |= set(self._exports)
        self._wake.set()
        try:
            while not lost.done():
                self._wake.clear()
                if self._ready and not registered:
                    await channel.send(encode_request(0, "register", self._identity))
                    registered = True
                while self._dirty:
                    await self._send(channel, self._dirty.pop())
                self._clean.set()
                await self._wake.wait()
        except Unavailable:
            pass
        finally:
            await watch.close()
            channel.close()

    async def _send(self, channel: Channel, name: str) -> None:
        fields: dict[str, Any] = {**self._identity, "name": name}
        export = self._exports.get(name)
        try:
            if export is None:
                await channel.send(encode_request(0, "forget", fields))
                return
            state, fds = export()
            message = encode_request(0, "store", fields | {"state": json.dumps(state)})
        except InvalidArgument as exc:
            log.error("cannot store %s: %s", name, exc)
            return
        # The descriptors are only good until this returns to the loop: when there is no room, ask again later.
        try:
            packets.send(channel.sock, message, fds)
        except BlockingIOError:
            await asyncio.sleep(0.01)
            self._dirty.add(name)
        except OSError as exc:
            raise Unavailable(f"supervisor: {exc.strerror}") from exc


async def _until_end(channel: Channel) -> None:
    """Nothing is expected to come but the end."""
    try:
        while (await channel.receive())[0]:
            pass
    except (ProtocolError, Unavailable) as exc:
        log.warning("supervisor: %s", exc)
