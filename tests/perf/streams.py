"""Exec and port-forward throughput: host agent, real crun, real shim, this process as the client.

A plain asyncio socket relay beside it, in the same run, says what the machine can do.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from wsproto.events import BytesMessage

from hyperpod.cli.streamclient import SpdyClient, Stream
from hyperpod.config import StreamingConfig
from tests.agentkit import AgentKit, host_agent, make_busybox_layer
from tests.perf.report import Figure, progress, spread
from tests.streamkit import ALL, OUT, Command, StreamPod, WebSocket, exit_code, stream_pod

PIECE = bytes(32 * 1024)
"""As Go's io.Copy writes."""
_SINK = ("sh", "-c", "exec cat >/dev/null")


async def figures(megabytes: int, rounds: int) -> list[Figure]:
    size = megabytes << 20
    with tempfile.TemporaryDirectory(prefix="hp-perf-") as folder:
        base = Path(folder)
        async with host_agent(base, make_busybox_layer(base)) as place:
            kit = await AgentKit.claim(place)
            try:
                async with stream_pod(kit, StreamingConfig()) as pod:
                    return await _all(pod, size, rounds)
            finally:
                await kit.client.close()


async def _all(pod: StreamPod, size: int, rounds: int) -> list[Figure]:
    container = await pod.run("sleep", "10000")

    async def spdy_down() -> None:
        command = await Command.open(_dd(pod, container, size))
        assert await _count(command.stdout.read) == size  # type: ignore[union-attr]
        await command.client.close()

    async def spdy_up() -> None:
        command = await Command.open(pod.exec_url(container, *_SINK, wanted=ALL), ALL)
        for _ in range(size // len(PIECE)):
            await command.write(PIECE)
        await command.end()
        assert exit_code((await command.result())[2]) == 0

    async def web_down() -> None:
        socket, got = await WebSocket.connect(_dd(pod, container, size), "v5.channel.k8s.io"), 0
        async for message in socket.messages():
            got += len(message) - 1 if message[:1] == b"\x01" else 0
        assert got == size
        socket.close()

    async def web_up() -> None:
        url = pod.exec_url(container, *_SINK, wanted=ALL)
        socket = await WebSocket.connect(url, "v5.channel.k8s.io")
        frame = socket._connection.send(
            BytesMessage(b"\0" + PIECE)
        )  # masked once: the client's cost is not ours
        for _ in range(size // len(PIECE)):
            await socket._loop.sock_sendall(socket._sock, frame)
        await socket.send(b"\xff\x00")
        assert b"Success" in (await socket.channels())[3]
        socket.close()

    runs: dict[str, Callable[[], Awaitable[None]]] = {
        "exec down, SPDY": spdy_down, "exec up, SPDY": spdy_up,
        "exec down, WebSocket": web_down, "exec up, WebSocket": web_up,
    }  # fmt: skip
    async with _source(size) as source, _sink() as sink, _relay(source) as plain:
        runs["port-forward down"] = lambda: _forward_down(pod, source, size)
        runs["port-forward up"] = lambda: _forward_up(pod, sink, size)
        runs["plain asyncio relay"] = lambda: _plain(plain, size)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.monotonic()
                await run()
                rates[name].append(size / (1 << 20) / (time.monotonic() - start))
                progress(f"{name}: {rates[name][-1]:.0f} MiB/s")
    return [
        Figure(
            name, statistics.median(found), "MiB/s", None if "plain" in name else 150.0, at_least=True,
            note=f"{rounds} x {size >> 20} MiB: {spread(found)}",
        )
        for name, found in rates.items()
    ]  # fmt: skip


def _dd(pod: StreamPod, container: str, size: int) -> str:
    return pod.exec_url(container, "dd", "if=/dev/zero", "bs=64k", f"count={size >> 16}", wanted=OUT)


async def _count(read: Callable[[], Awaitable[bytes]]) -> int:
    total = 0
    while data := await read():
        total += len(data)
    return total


@asynccontextmanager
async def _listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    async with await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20) as server:
        yield server.sockets[0].getsockname()[1]


def _source(size: int) -> AbstractAsyncContextManager[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        piece = bytes(256 * 1024)
        for _ in range(size // len(piece)):
            writer.write(piece)
            await writer.drain()
        writer.close()

    return _listening(serve)


def _sink() -> AbstractAsyncContextManager[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d" % await _count(lambda: reader.read(1 << 20)))
        writer.close()

    return _listening(serve)


def _relay(port: int) -> AbstractAsyncContextManager[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, other = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        while data := await inner.read(1 << 18):
            writer.write(data)
            await writer.drain()
        writer.close()
        other.close()

    return _listening(serve)


async def _plain(port: int, size: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    assert await _count(lambda: reader.read(1 << 18)) == size
    writer.close()


async def _forwarded(pod: StreamPod, port: int) -> tuple[SpdyClient, Stream]:
    client = await SpdyClient.connect(pod.forward_url(), "portforward.k8s.io")
    await client.open((("streamtype", "error"), ("port", str(port)), ("requestid", "0")))
    return client, await client.open((("streamtype", "data"), ("port", str(port)), ("requestid", "0")))


async def _forward_down(pod: StreamPod, port: int, size: int) -> None:
    client, stream = await _forwarded(pod, port)
    assert await _count(stream.read) == size
    await client.close()


async def _forward_up(pod: StreamPod, port: int, size: int) -> None:
    client, stream = await _forwarded(pod, port)
    for _ in range(size // len(PIECE)):
        await stream.write(PIECE)
    await stream.end()
    assert int(await stream.read_all()) == size
    await client.close()
