"""The `process` stream: an exec whose life hangs on its connection, or a watch on a container's process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

from hyperpod.agent.streams import Peer
from hyperpod.errors import FailedPrecondition, HyperpodError, NotFound, ProtocolError
from hyperpod.wire.process import (
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    OUTPUT_GRACE,
    Starting,
    decode_resize,
    encode_exit,
)
from hyperpod.wire.stdio import Frame, FrameType, Open, encode_opened

if TYPE_CHECKING:
    from hyperpod.agent.containers import Containers
    from hyperpod.agent.process import ProcessIO

log = logging.getLogger(__name__)

HANGUP_GRACE = 10.0
"""Seconds between SIGHUP and SIGKILL for an exec whose client is gone."""

_DENIED = ("Permission denied", "is not executable", "open executable")
"""crun, of a program that cannot be executed: of Debian 12 and of 13."""


class ProcessStream:
    """Made for one connection; speaks wire.process."""

    def __init__(self, containers: Containers, what: Open) -> None:
        """Raises NotFound: no such container."""
        self._containers, self._what = containers, what
        self._container = containers.get(what.container)
        self._owner = containers.tools.owner
        self._peer: Peer | None = None
        self._task: asyncio.Task[None] | None = None
        self._starting = Starting()

    def attach(self, peer: Peer, what: Open) -> None:
        self._peer = peer
        if not self._what.exec_id:
            peer.send([encode_opened(0)])
            self._task = self._owner.spawn(f"watch/{self._what.container[:12]}", self._watch())

    def detach(self, peer: Peer) -> None:
        if self._peer is None:
            return
        self._peer = None
        if not self._what.exec_id:
            if self._task is not None:
                self._task.cancel()
        elif self._task is not None and not self._owner.closed:
            self._owner.spawn(f"hang-up/{self._what.exec_id}", self._hang_up(self._task))

    def flush(self) -> None:
        """There is never much to send."""

    def receive(self, frame: Frame) -> None:
        """START or RESIZE. Raises ProtocolError."""
        if frame.type is FrameType.START and self._what.exec_id and self._task is None:
            if (process := self._starting.feed(frame)) is not None:
                self._task = self._owner.spawn(f"session/{self._what.exec_id}", self._run(process))
        elif frame.type is FrameType.RESIZE:
            rows, columns = decode_resize(frame.offset)
            with contextlib.suppress(HyperpodError, OSError):  # ended, or not begun
                self._io.resize(rows, columns)
        else:
            raise ProtocolError(f"stdio: {frame.type.name} to a process")

    @property
    def _io(self) -> ProcessIO:
        """Raises NotFound."""
        return self._container.exec(self._what.exec_id).io if self._what.exec_id else self._container.io

    def _send(self, data: bytes) -> None:
        if self._peer is not None:
            self._peer.send([data])

    def _fail(self, why: str) -> None:
        if self._peer is not None:
            self._peer.drop(why)

    async def _watch(self) -> None:
        self._send(encode_exit(await self._container.ended()))

    async def _run(self, process: bytes) -> None:
        what = self._what
        try:
            self._container.check_running()
            await self._containers.start_exec(
                what.container, what.exec_id, process, tty=what.tty, stdin=what.stdin
            )
        except NotFound as exc:
            self._send(encode_exit(EXIT_NOT_FOUND, str(exc)))
            return
        except (HyperpodError, OSError) as exc:
            if isinstance(exc, FailedPrecondition) and any(text in str(exc) for text in _DENIED):
                self._send(encode_exit(EXIT_NOT_EXECUTABLE, str(exc)))
            else:
                self._fail(str(exc))
            return
        self._send(encode_opened(0))
        try:
            found = self._container.exec(what.exec_id)
            code = await found.wait()
        except NotFound as exc:  # the container was removed
            self._fail(str(exc))
            return
        found.io.end_when_idle(OUTPUT_GRACE)
        self._send(encode_exit(code))

    async def _hang_up(self, session: asyncio.Task[None]) -> None:
        """The client is gone: end what runs, forget what has ended."""
        what, cgroups = self._what, self._containers.tools.cgroups
        try:
            found = self._container.exec(what.exec_id)
        except NotFound:  # not started: being started, or refused
            with contextlib.suppress(HyperpodError):
                await self._containers.remove_exec(what.container, what.exec_id, kill=True)
            return
        if session.done():
            await self._container.remove_exec(what.exec_id, kill=False)
            return
        found.io.hang_up()
        cgroups.signal_all(found.cgroup, signal.SIGHUP)
        await asyncio.wait([session], timeout=HANGUP_GRACE)
        try:
            await self._containers.remove_exec(what.container, what.exec_id, kill=True)
        except HyperpodError as exc:
            log.warning("exec %s: %s", what.exec_id, exc)
