"""`python -m tests.perf.peer source BYTES | sink | relay PORT`: the other end of a connection, as a process.

Prints the port that it listens on, and serves until its input ends. `source` sends so many bytes to whoever comes,
`sink` answers with the number of those that it got, `relay` passes on what comes from PORT: what asyncio can do.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

_PIECE = 256 * 1024
_LIMIT = 1024 * 1024

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def source(size: int) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        piece = bytes(_PIECE)
        for _ in range(size // len(piece)):
            writer.write(piece)
            await writer.drain()
        writer.close()

    return serve


async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    total = 0
    while data := await reader.read(_LIMIT):
        total += len(data)
    writer.write(b"%d" % total)
    writer.close()


def relay(port: int) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, other = await asyncio.open_connection("127.0.0.1", port, limit=_LIMIT)
        while data := await inner.read(_PIECE):
            writer.write(data)
            await writer.drain()
        writer.close()
        other.close()

    return serve


async def main(kind: str, *values: str) -> None:
    serve = {"source": source, "relay": relay}[kind](int(values[0])) if values else sink
    async with await asyncio.start_server(serve, "127.0.0.1", 0, limit=_LIMIT) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
