"""Port-forward from the URL to a port beside the agent and back, over SPDY, in a tunnel, over WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from hyperpod.cli.streamclient import SpdyClient, Stream
from hyperpod.config import StreamingConfig
from hyperpod.errors import Unavailable
from tests.agentkit import TIMEOUT, AgentKit
from tests.streamkit import StreamPod, WebSocket, stream_pod, tunnelled


@pytest.fixture(params=["host", "guest"])
async def pod(agent: AgentKit, request: pytest.FixtureRequest) -> AsyncIterator[StreamPod]:
    """Of the host, whose agent hands pipes and sockets over, and as a VM, where all goes in frames."""
    config = StreamingConfig()
    async with stream_pod(agent, config, guest=request.param == "guest") as made:
        yield made


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends everything back, and its own end after the client's."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def listening(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[int]:
    async with await asyncio.start_server(serve, host, 0) as server:
        yield server.sockets[0].getsockname()[1]


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Nobody listens there, nor can anybody else take it meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


class Forward:
    """One session of a client; `connect` opens forwarded connections."""

    def __init__(self, client: SpdyClient) -> None:
        self.client, self._ids = client, 0

    async def connect(self, port: int) -> tuple[Stream, Stream]:
        """The error and the data stream."""
        self._ids += 1
        headers = (("port", str(port)), ("requestid", str(self._ids)))
        error = await self.client.open((("streamtype", "error"), *headers))
        await error.end()
        return error, await self.client.open((("streamtype", "data"), *headers))

    async def roundtrip(self, port: int, data: bytes) -> bytes:
        error, stream = await self.connect(port)

        async def write() -> None:
            for start in range(0, len(data), 100_000):
                await stream.write(data[start : start + 100_000])
            await stream.end()

        writing = asyncio.ensure_future(write())
        async with asyncio.timeout(TIMEOUT):
            got, text = await asyncio.gather(stream.read_all(), error.read_all())
            await writing
        assert text == b"", text
        return got


Opener = Callable[[], Awaitable[Forward]]


@pytest.fixture(params=["spdy", "tunnel"])
async def opened(pod: StreamPod, request: pytest.FixtureRequest) -> AsyncIterator[Opener]:
    """Opens sessions, straight or in a tunnel."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_one() -> Forward:
            if request.param == "tunnel":
                return Forward(await stack.enter_async_context(tunnelled(pod.forward_url())))
            return Forward(await SpdyClient.connect(pod.forward_url(), "portforward.k8s.io"))

        yield open_one


async def test_many_ports_and_connections(opened: Opener) -> None:
    data = os.urandom(3_000_000)
    async with listening(echo) as one, listening(echo) as two:
        session = await opened()
        results = await asyncio.gather(*(session.roundtrip(port, data) for port in (one, two) * 5))
        assert {hashlib.sha256(got).digest() for got in results} == {hashlib.sha256(data).digest()}
        assert await session.roundtrip(one, b"") == b""
        await session.client.close()


async def test_ipv6_when_ipv4_does_not_answer(opened: Opener) -> None:
    async with listening(echo, "::1") as port:
        session = await opened()
        assert await session.roundtrip(port, b"six") == b"six"
        await session.client.close()


async def test_a_refused_port_and_the_session_lives_on(opened: Opener) -> None:
    session = await opened()
    with closed_port() as closed:
        error, _ = await session.connect(closed)
        async with asyncio.timeout(TIMEOUT):
            text = await error.read_all()
    assert b"Connection refused" in text
    async with listening(echo) as port:
        assert await session.roundtrip(port, b"alive") == b"alive"
    await session.client.close()


async def test_half_closes_both_ways(opened: Opener) -> None:
    """The client ends first and still gets the answer; the server ends first and still gets the rest."""
    heard = asyncio.Queue[bytes]()

    async def talks_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.write_eof()
        heard.put_nowait(await reader.read())
        writer.close()

    async with listening(talks_first) as port:
        session = await opened()
        error, stream = await session.connect(port)
        assert await stream.read_all() == b"hello"
        await stream.write(b"and you")
        await stream.end()
        async with asyncio.timeout(TIMEOUT):
            assert await heard.get() == b"and you"
            assert await error.read_all() == b""
        await session.client.close()


async def test_a_connection_that_the_port_resets(opened: Opener) -> None:
    """Both streams are reset without a word: for a word on an error stream kubectl ends the whole session."""

    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async with listening(breaks) as port, listening(echo) as other:
        session = await opened()
        error, stream = await session.connect(port)
        await stream.write(b"x")
        async with asyncio.timeout(TIMEOUT):
            for one in (error, stream):
                with pytest.raises(Unavailable, match="reset"):
                    while True:
                        assert await one.read() == b""
        assert await session.roundtrip(other, b"goes on") == b"goes on"
        await session.client.close()


async def test_an_answer_before_all_was_read(pod: StreamPod, opened: Opener) -> None:
    """A server that answers, takes no more and closes, as with HTTP's 413."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def impatient() -> None:
            connection, _ = server.accept()
            connection.recv(5)
            connection.sendall(b"no more")
            connection.close()  # with unread bytes: a reset

        answering = asyncio.create_task(asyncio.to_thread(impatient))
        session = await opened()
        error, stream = await session.connect(server.getsockname()[1])
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(Unavailable):
                await stream.write(b"x" * 200_000)
                await answering
                for _ in range(5):
                    await stream.write(b"x" * 200_000)
            await answering
            # A guest's agent may hear of the reset before it has read the answer.
            assert await stream.read_all() in ([b"no more"] if pod.hands_over else [b"no more", b""])
            assert await error.read_all() == b""
        await session.client.close()


async def test_a_client_that_resets_or_leaves_closes_the_connections(opened: Opener) -> None:
    said = asyncio.Queue[str]()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said.put_nowait("here")
        with contextlib.suppress(OSError):
            await reader.read()
        said.put_nowait("gone")
        writer.close()

    async with listening(waits) as port:
        session = await opened()
        async with asyncio.timeout(TIMEOUT):
            _, stream = await session.connect(port)
            await stream.write(b"x")
            assert await said.get() == "here"
            await stream.reset()
            assert await said.get() == "gone"
            await session.connect(port)
            assert await said.get() == "here"
            session.client.abort()
            assert await said.get() == "gone"


async def test_a_stalled_connection_is_bounded(opened: Opener) -> None:
    """A server that reads nothing: the client is held up, other things in the pod go on."""
    held = asyncio.Event()

    async def reads_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        await echo(reader, writer)

    data = os.urandom(30_000_000)
    async with listening(reads_late) as slow, listening(echo) as quick:
        session = await opened()
        running = asyncio.ensure_future(session.roundtrip(slow, data))
        await asyncio.sleep(0.5)
        other = await opened()
        assert await other.roundtrip(quick, b"quick") == b"quick"
        await other.client.close()
        assert not running.done()
        held.set()
        assert hashlib.sha256(await running).digest() == hashlib.sha256(data).digest()
        await session.client.close()


async def test_incomplete_connections_end(pod: StreamPod, opened: Opener) -> None:
    pod.creation = 1.0
    session = await opened()
    error = await session.client.open((("streamtype", "error"), ("port", "80"), ("requestid", "1")))
    async with asyncio.timeout(20):
        assert b"timed out" in await error.read_all()
    await session.client.close()


async def test_websocket_channels(pod: StreamPod) -> None:
    with closed_port() as closed:
        async with listening(echo) as port:
            client = await WebSocket.connect(pod.forward_url(port, closed), "v4.channel.k8s.io")
            await client.send(b"\0ping")
            got: dict[int, bytes] = {}
            async for message in client.messages():
                got[message[0]] = got.get(message[0], b"") + message[1:]
                if b"ping" in got.get(0, b"") and len(got.get(3, b"")) > 2:
                    break
            little = port.to_bytes(2, "little")
            assert got[0] == little + b"ping"
            assert got[1] == little
            assert b"Connection refused" in got[3]
            client.close()
