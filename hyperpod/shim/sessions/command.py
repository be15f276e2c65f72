"""Exec and attach."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Coroutine
from typing import Any

from hyperpod.errors import GuestError, HyperpodError, InvalidArgument, Unavailable
from hyperpod.logs import printable
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions.direct import PipeEnd, connect, taken
from hyperpod.shim.sessions.session import ClientGone, Session, first
from hyperpod.shim.sessions.socket import StreamSocket
from hyperpod.shim.sessions.spec import SessionSpec
from hyperpod.shim.sessions.stdin import InputQueue, SharedStdins, StdinLink
from hyperpod.shim.sessions.tap import Fanout, Tap
from hyperpod.tasks import bounded
from hyperpod.wire.outcome import Outcome
from hyperpod.wire.process import OUTPUT_GRACE, HostProcess, encode_resize
from hyperpod.wire.remotecommand import (
    Channel,
    Left,
    Ready,
    Resized,
    Stdin,
    StdinEnded,
    remote_command,
)
from hyperpod.wire.stdio import ACK_EVERY, Open
from hyperpod.wire.stdioends import HostReader

log = logging.getLogger(__name__)

_CHANNELS = {"stdout": Channel.STDOUT, "stderr": Channel.STDERR}
_QUIET, _LEAVE = 0.5, 5.0
"""Seconds without output, and at most, until an attach ends whose client has ended its input for itself only."""
_TEXT = 1024
_START_TIMEOUT = 90.0
"""Seconds; the agent gives crun 60, and a terminal 10 more."""


class CommandSession(Session):
    """What exec and attach share: the client's streams."""

    def __init__(self, sock: socket.socket, spec: SessionSpec) -> None:
        self.protocol = remote_command(spec.transport, spec.protocol, spec.wanted)
        super().__init__(sock, spec, self.protocol)
        self.input = InputQueue()
        self._ready = asyncio.Event()
        self._input_ended = asyncio.Event()
        self._control: StreamSocket | None = None
        self._size: Resized | None = None

    async def _receive(self, data: bytes) -> None:
        taken = 0
        for event in self.protocol.receive(data):
            match event:
                case Stdin(payload):
                    self.input.put(payload)
                    taken += len(payload)
                case Ready():
                    self._ready.set()
                case StdinEnded():
                    self.input.end()
                    self._input_ended.set()
                case Resized():
                    self._resize(event)
                case Left():
                    raise ClientGone("the client said goodbye")
        self.protocol.consumed(taken)
        if self.input.full:
            self.flush()
            await self.client.hold(self.input.room())

    def _resize(self, size: Resized) -> None:
        self._size = size  # for the process that is not there yet
        if self._control is not None:
            self._control.write([encode_resize(size.rows, size.columns)])

    def control(self, link: StreamSocket) -> None:
        """The process is there: its terminal's size goes this way."""
        self._control = link
        if self._size is not None:
            self._resize(self._size)

    def ended(self, channel: Channel) -> None:
        self.protocol.end(channel)
        self.flush()

    async def _serve(self) -> None:
        try:
            async with asyncio.timeout(self.spec.creation):
                await self._ready.wait()
        except TimeoutError as exc:
            raise ClientGone(f"the client did not open its streams within {self.spec.creation:g} s") from exc
        try:
            outcome = await self.work()
        except (HyperpodError, ExceptionGroup) as exc:
            cause = first(exc)
            if not isinstance(cause, HyperpodError):
                raise cause from None
            outcome = Outcome(None, printable(str(cause), _TEXT))
        self.protocol.finish(outcome)
        self.flush()

    async def work(self) -> Outcome:
        """Raises HyperpodError, ClientGone, or a group of them."""
        raise NotImplementedError


class ExecSession(CommandSession):
    """A process of its own, which lives as long as the session; an operator's shell, which runs already, too."""

    def __init__(
        self, sock: socket.socket, spec: SessionSpec, dialer: AgentDialer, process: bytes | None
    ) -> None:
        """`process`: OCI's, as JSON; None for a shell. Raises InvalidArgument: it is too large, or none."""
        super().__init__(sock, spec)
        self._dialer = dialer
        request = Open(spec.container, "process", spec.exec_id, tty=spec.tty, stdin=spec.wanted.stdin)
        self._process = HostProcess(request, process)
        self._pipes: set[PipeEnd] = set()
        try:
            self._program = "a shell" if process is None else repr(json.loads(process)["args"][0][:200])
        except (ValueError, LookupError, TypeError) as exc:
            raise InvalidArgument("the exec's OCI process is not one") from exc

    async def work(self) -> Outcome:
        sock, data = await self._dialer.open()
        link = StreamSocket(sock)
        try:
            link.write([self._process.start()])
            await bounded(
                self._until(link, data, started=True), _START_TIMEOUT, f"the start of {self._program}"
            )
            if self._process.exit is None or not self._process.exit.text:
                return await self._relay(link)
            text = f"cannot run {self._program}: {printable(self._process.exit.text, _TEXT)}"
            channel = Channel.STDERR if self.spec.wanted.stderr else Channel.STDOUT
            await self.to_client(
                channel, text.encode(errors="replace") + (b"\r\n" if self.spec.tty else b"\n")
            )
            return Outcome(self._process.exit.code, text)
        finally:
            self._control = None
            link.close()

    async def _until(self, link: StreamSocket, data: bytes = b"", *, started: bool) -> None:
        """Read the process's connection until it has started, or ended. Raises Unavailable, StreamRefused."""
        process = self._process
        while True:
            process.feed(data)
            if process.exit is not None or (started and process.opened):
                break
            data = await _receive(link, "the process")
        if process.exit is not None:
            for pipe in self._pipes:
                pipe.end_when_idle(OUTPUT_GRACE)

    async def _relay(self, link: StreamSocket) -> Outcome:
        stdin = asyncio.ensure_future(self._stdin()) if self.spec.wanted.stdin else None
        try:
            self.control(link)
            async with asyncio.TaskGroup() as group:
                for stream in ("stdout",) if self.spec.tty else ("stdout", "stderr"):
                    group.create_task(self._output(stream))
                group.create_task(self._until(link, started=False))
        finally:
            if stdin is not None:
                stdin.cancel()
                await asyncio.gather(stdin, return_exceptions=True)
        assert self._process.exit is not None
        return Outcome(self._process.exit.code)

    async def _output(self, stream: str) -> None:
        channel = _CHANNELS[stream]
        wanted = self.spec.wanted.stdout if channel is Channel.STDOUT else self.spec.wanted.stderr
        request = Open(self.spec.container, stream, self.spec.exec_id, direct=self._dialer.direct)
        reader = HostReader(request)
        link, data = await connect(self._dialer)
        try:
            link.write([reader.start()])
            while True:
                for frame in reader.feed(data):
                    if wanted:
                        await self.to_client(channel, frame.payload)
                if reader.gap_bytes:
                    raise GuestError(f"{reader.gap_bytes} bytes of {stream} are lost")
                if reader.handed_over:
                    with PipeEnd(taken(link)) as pipe:
                        await self._from_pipe(pipe, channel, wanted=wanted)
                    break
                if reader.offset - reader.acked >= ACK_EVERY or reader.eof:
                    link.write([reader.ack(reader.offset)])
                if reader.eof:
                    break
                data = await _receive(link, stream)
        finally:
            link.close()
        self.ended(channel)

    async def _from_pipe(self, pipe: PipeEnd, channel: Channel, *, wanted: bool) -> None:
        if self._process.exit is not None:
            pipe.end_when_idle(OUTPUT_GRACE)
        self._pipes.add(pipe)
        try:
            while data := await pipe.read():
                if wanted:
                    await self.to_client(channel, data)
        finally:
            self._pipes.discard(pipe)

    async def _stdin(self) -> None:
        direct = self._dialer.direct
        link = StdinLink(self._dialer, Open(self.spec.container, "stdin", self.spec.exec_id, direct=direct))
        try:
            await link.open()
            await link.pump(self.input)
            await link.end()
            await asyncio.Event().wait()  # what is on its way must not be cut off by our going
        except HyperpodError as exc:
            log.info("exec %s: input: %s", self.spec.exec_id[:12], printable(str(exc), 300))
        finally:
            self.input.discard()
            await link.close()


class AttachSession(CommandSession):
    """A view of a container's own process; ends with its output, and leaves it running."""

    def __init__(
        self,
        sock: socket.socket,
        spec: SessionSpec,
        dialer: AgentDialer,
        fanout: Fanout,
        stdins: SharedStdins,
    ) -> None:
        super().__init__(sock, spec)
        self._dialer, self._fanout, self._stdins = dialer, fanout, stdins

    async def work(self) -> Outcome:
        wanted, once = self.spec.wanted, self.spec.stdin_once and not self.spec.tty
        background: list[asyncio.Future[Any]] = []
        left: Coroutine[Any, Any, None] | None = None
        if wanted.stdin:
            running = asyncio.ensure_future(self._stdins.run(self.spec.container, self.input, once=once))
            background.append(running)
            left = None if once else self._left(running)
        if wanted.tty:
            background.append(asyncio.ensure_future(self._terminal()))
        tap = self._fanout.tap(("stdout", "stderr"))
        try:
            await self._output(tap, left)
        finally:
            tap.close()
            if wanted.stdin:  # who has gone has ended its input, too; what it sent before counts
                self.input.end()
                await asyncio.wait({running}, timeout=_LEAVE)
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
        return Outcome()

    async def _left(self, delivery: asyncio.Future[None]) -> None:
        """The client's input has ended, and the process has it, unless it does not read."""
        await self._input_ended.wait()
        await asyncio.wait({delivery}, timeout=_LEAVE)

    async def _output(self, tap: Tap, left: Coroutine[Any, Any, None] | None) -> None:
        """Until the container's output ends, or what `left`, the end of the client's input, has led to."""
        loop = asyncio.get_running_loop()
        ended = asyncio.ensure_future(left) if left is not None else None
        latest = float("inf")
        news: asyncio.Task[tuple[str, bytes | memoryview] | None] | None = None
        try:
            while True:
                news = news or asyncio.ensure_future(tap.get())
                if ended is None:
                    await asyncio.wait({news})
                elif not ended.done():
                    await asyncio.wait({news, ended}, return_when=asyncio.FIRST_COMPLETED)
                else:
                    latest = min(latest, loop.time() + _LEAVE)
                    await asyncio.wait({news}, timeout=_QUIET)
                    if not news.done() or loop.time() > latest:
                        return
                if news.done():
                    item, news = news.result(), None
                    if item is None:
                        return
                    await self.to_client(_CHANNELS[item[0]], item[1])
        finally:
            for task in (news, ended):
                if task is not None:
                    task.cancel()

    async def _terminal(self) -> None:
        """Sizes go over a connection that watches the container's process."""
        sock, data = await self._dialer.open()
        link, process = StreamSocket(sock), HostProcess(Open(self.spec.container, "process"), None)
        try:
            link.write([process.start()])
            while process.exit is None:
                process.feed(data)
                if process.opened and self._control is None:
                    self.control(link)
                data = await link.receive()
                if not data:
                    return
        finally:
            self._control = None
            with contextlib.suppress(OSError):
                link.close()


async def _receive(link: StreamSocket, what: str) -> bytes:
    """Raises Unavailable at the end, too."""
    try:
        data = await link.receive()
    except OSError as exc:
        raise Unavailable(f"{what} was lost: {exc.strerror}") from exc
    if not data:
        raise Unavailable(f"{what} was lost: its sandbox or agent has gone")
    return data
