"""What streaming sessions do with a peer that does nothing: each wait ends, and what waits is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from hyperpod.agent.streams import InputStream
from hyperpod.errors import DeadlineExceeded
from hyperpod.shim.dialer import AgentDialer
from hyperpod.shim.sessions import command, stdin
from hyperpod.shim.sessions.command import ExecSession
from hyperpod.shim.sessions.session import Outgoing, Session
from hyperpod.shim.sessions.spec import SessionSpec
from hyperpod.shim.sessions.stdin import StdinLink
from hyperpod.shim.sessions.tap import Fanout
from hyperpod.shim.stream import StreamPump
from hyperpod.wire import stdio
from hyperpod.wire.remotecommand import Wanted
from hyperpod.wire.stdio import FrameDecoder, Open
from hyperpod.wire.upgrade import Transport

CONTAINER, EXEC = "ab" * 32, "cd" * 16
SPEC = SessionSpec(
    transport=Transport.WEBSOCKET, protocol="v4.channel.k8s.io", head=b"", early=b"", idle=0.2, creation=5.0,
    container=CONTAINER, exec_id=EXEC, wanted=Wanted(stdout=True),
)  # fmt: skip


class SilentAgent:
    """Takes connections, and everything that comes on them."""

    direct = False

    def __init__(self) -> None:
        self.theirs: list[socket.socket] = []

    async def open(self) -> tuple[socket.socket, bytes]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.theirs.append(theirs)
        return ours, b""

    def close(self) -> None:
        for sock in self.theirs:
            sock.close()


def dialer(agent: SilentAgent) -> AgentDialer:
    return cast(AgentDialer, agent)


async def test_an_exec_that_does_not_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_START_TIMEOUT", 0.1)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    agent = SilentAgent()
    session = ExecSession(theirs, SPEC, dialer(agent), b'{"args": ["true"]}')
    loop, got = asyncio.get_running_loop(), b""
    async with asyncio.timeout(10):
        running = asyncio.ensure_future(session.run())
        while data := await loop.sock_recv(ours, 4096):
            got += data
        ours.close()
        await running
    assert b"the start of 'true' took longer than 0.1 s" in got
    agent.close()


async def test_input_that_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdin, "_OPEN_TIMEOUT", 0.1)
    agent = SilentAgent()
    link = StdinLink(dialer(agent), Open(CONTAINER, "stdin"))
    with pytest.raises(DeadlineExceeded, match="input"):
        await link.open()
    await link.close()
    agent.close()


async def test_input_that_is_not_taken_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperpod.shim.sessions.socket._LINGER", 0.1)
    agent = SilentAgent()
    link = StdinLink(dialer(agent), Open(CONTAINER, "stdin"))
    opening = asyncio.ensure_future(link.open())
    await asyncio.sleep(0)
    agent.theirs[0].send(stdio.encode_opened(0))
    await opening
    assert link._socket is not None
    link._socket.write([bytes(1_000_000)])
    async with asyncio.timeout(5):
        await link.leave()
    agent.close()


class Nothing:
    """A protocol without any."""

    def room(self, key: Any, /) -> int:
        return 1 << 30

    def send(self, key: Any, data: object, /) -> None: ...

    def data_to_send(self) -> list[Any]:
        return []


class Done(Session):
    """Its work is done; its client reads nothing."""

    async def _receive(self, data: bytes) -> None: ...

    size = 3_000_000

    async def _serve(self) -> None:
        self.client.write([bytes(self.size)])


async def test_who_does_not_hear_the_end_is_idle_one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperpod.shim.sessions.socket._LINGER", 0.1)
    ours, theirs = socket.socketpair()
    async with asyncio.timeout(5):
        await Done(theirs, SPEC, cast(Outgoing, Nothing())).run()
    ours.close()


async def test_who_reads_slowly_and_pings_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """client-go pings every 5 s: after a close what the kernel has yet to send would be answered by a reset."""
    monkeypatch.setattr("hyperpod.shim.sessions.socket._LINGER", 0.1)
    monkeypatch.setattr(Done, "size", 200_000)  # the kernel takes so much at once, the client's does not
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.connect(listener.getsockname())
        client.setblocking(False)
        sock, _ = listener.accept()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
        running = asyncio.ensure_future(Done(sock, replace(SPEC, idle=60.0), cast(Outgoing, Nothing())).run())
        await asyncio.sleep(0.5)
        await loop.sock_sendall(client, b"ping")
        await asyncio.sleep(0.1)
        got = 0
        async with asyncio.timeout(20):
            while part := await loop.sock_recv(client, 65_536):
                got += len(part)
            assert got == 200_000
            await running


class Peer:
    """What the agent's stream sees of a connection."""

    writable = True

    def __init__(self) -> None:
        self.held, self.acked = False, 0

    def send(self, buffers: Sequence[Any]) -> None:
        for frame in FrameDecoder().feed(b"".join(buffers)):
            self.acked = max(self.acked, frame.offset)

    def send_with(self, frame: bytes, fd: int) -> bool:
        return False

    def hold(self, held: bool) -> None:
        self.held = held

    def drop(self, why: str) -> None: ...

    def finish(self) -> None: ...


async def test_input_of_many_connections_does_not_add_up() -> None:
    """Each may leave a window that the process has not read; the next one is not read from until that is less."""
    stream = InputStream(ends_with_peer=False, eof_closes=False)
    reading, writing = os.pipe2(os.O_NONBLOCK)
    stream.start(writing, lambda: os.close(writing))
    sent = []
    for _ in range(10):
        peer = Peer()
        stream.attach(peer, Open(CONTAINER, "stdin"))
        offset = 0
        while not peer.held and offset - peer.acked < stdio.WINDOW:
            data = os.urandom(stdio.MAX_PAYLOAD)
            stream.receive(stdio.Frame(stdio.FrameType.DATA, offset, data))
            sent.append(data)
            offset += len(data)
        stream.detach(peer)
    assert len(stream._pending) <= 2 * stdio.WINDOW
    last = Peer()
    stream.attach(last, Open(CONTAINER, "stdin"))
    states, got = [last.held], b""
    async with asyncio.timeout(10):
        while len(got) < sum(map(len, sent)):
            with contextlib.suppress(BlockingIOError):
                got += os.read(reading, 1 << 20)
            await asyncio.sleep(0)
    assert got == b"".join(sent)
    assert [*states, last.held] == [True, False]
    stream.close()
    os.close(reading)


class Sink:
    """A log that takes everything."""

    def __init__(self) -> None:
        self.turn, self.gaps = asyncio.Lock(), 0

    def offset(self, stream: str) -> int:
        return 0

    def has_ended(self, stream: str) -> bool:
        return False

    async def write(self, stream: str, offset: int, records: list[bytes], gap: int = 0) -> None:
        self.gaps += gap

    async def end(self, stream: str) -> None: ...


async def test_a_guest_does_not_fill_our_log_with_its_gaps(caplog: pytest.LogCaptureFixture) -> None:
    agent, sink = SilentAgent(), Sink()
    pump = StreamPump(CONTAINER, "stdout", dialer(agent), sink, Fanout(("stdout",)))
    running = asyncio.ensure_future(pump.run())
    await asyncio.sleep(0)
    [sock] = agent.theirs
    frames = [stdio.encode_opened(0)]
    for offset in range(0, 1000, 10):
        frames += (b"".join(stdio.encode_data(offset, b"x\n")), stdio.encode_gap(offset + 10))
    sock.sendall(b"".join(frames))
    async with asyncio.timeout(10):
        while sink.gaps < 800:
            await asyncio.sleep(0.01)
    assert len(caplog.records) < 3
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    agent.close()
