"""One streaming session after another, of every kind and byte-exact: what the short and the long soak share."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hyperpod.cli.streamclient import SpdyClient
from hyperpod.errors import HyperpodError
from hyperpod.wire.remotecommand import Wanted
from tests.streamkit import ALL, OUT, Command, WebSocket, exit_code

PORTS = (7001, 7002)
ECHO = " & ".join(f"nc -ll -p {port} -e cat" for port in PORTS)
"""For the shell of a container: it echoes on each of the ports."""

SIZES = (0, 1, 1000, 70_000, 600_000)
V5 = "v5.channel.k8s.io"
END_STDIN = b"\xff\x00"


class Place(Protocol):
    """A running container, and its pod."""

    async def exec(self, *argv: str, wanted: Wanted) -> str:
        """A URL."""

    async def forward(self) -> str:
        """A URL."""


T = TypeVar("T")


class NotBegun(Exception):
    """The session did not come about: nothing of it has happened, and it may be tried again."""


async def beginning(work: Awaitable[T]) -> T:
    """Raises NotBegun for what goes wrong until the server has switched protocols."""
    try:
        return await work
    except (HyperpodError, OSError) as exc:
        raise NotBegun(str(exc)) from exc


async def echo(place: Place, chance: random.Random) -> None:
    code, data = chance.randrange(256), chance.randbytes(chance.choice(SIZES))
    url = await place.exec("sh", "-c", f"cat; exit {code}", wanted=ALL)
    command = await beginning(Command.open(url, ALL))
    ending = asyncio.ensure_future(_send(data, chance, command.write, command.end))
    out, err, status = await command.result()
    await ending
    assert (out, err, exit_code(status)) == (data, b"", code)


async def echo_by_websocket(place: Place, chance: random.Random) -> None:
    code, data = chance.randrange(256), chance.randbytes(chance.choice(SIZES))
    url = await place.exec("sh", "-c", f"cat; exit {code}", wanted=ALL)
    web = await beginning(WebSocket.connect(url, V5))

    async def write(piece: bytes) -> None:
        await web.send(b"\0" + piece)

    async def end() -> None:
        await web.send(END_STDIN)

    ending = asyncio.ensure_future(_send(data, chance, write, end))
    try:
        got = await web.channels()
        await ending
    finally:
        web.close()
    assert (got.get(1, b""), got.get(2, b""), exit_code(status_of(got))) == (data, b"", code)


async def both_outputs(place: Place, chance: random.Random) -> None:
    code, count = chance.randrange(256), chance.randrange(20_000)
    url = await place.exec("sh", "-c", f"seq {count}; seq {count} >&2; exit {code}", wanted=OUT)
    expected = b"".join(b"%d\n" % i for i in range(1, count + 1))
    if chance.random() < 0.5:
        out, err, status = await (await beginning(Command.open(url))).result()
    else:
        web = await beginning(WebSocket.connect(url, V5))
        got = await web.channels()
        web.close()
        out, err, status = got.get(1, b""), got.get(2, b""), status_of(got)
    assert out == err == expected
    assert exit_code(status) == code


async def killed(place: Place, chance: random.Random) -> None:
    """A command that ends by a signal, with what it wrote before."""
    count = chance.randrange(1, 5000)
    url = await place.exec("sh", "-c", f"seq {count}; kill -9 $$", wanted=OUT)
    out, _, status = await (await beginning(Command.open(url))).result()
    assert out == b"".join(b"%d\n" % i for i in range(1, count + 1))
    assert exit_code(status) == 137


async def vanishing_client(place: Place, chance: random.Random) -> None:
    """Sooner or later, while output comes."""
    url = await place.exec("sh", "-c", "yes & sleep 1000", wanted=OUT)
    pause = chance.random() * 0.2
    if chance.random() < 0.5:
        command = await beginning(Command.open(url))
        await asyncio.sleep(pause)
        command.client.abort()
    else:
        web = await beginning(WebSocket.connect(url, V5))
        await asyncio.sleep(pause)
        web.close()


async def leaving_client(place: Place, chance: random.Random) -> None:
    """It leaves its input open and says goodbye."""
    url = await place.exec("cat", wanted=ALL)
    command = await beginning(Command.open(url, ALL))
    await command.write(chance.randbytes(chance.randrange(1000)) + b"x")
    await command.until(b"x")
    await command.client.close()


async def forwarded(place: Place, chance: random.Random) -> None:
    """Some connections in one session, each ended by a half-close or dropped."""
    client = await beginning(SpdyClient.connect(await place.forward(), "portforward.k8s.io"))
    try:
        await asyncio.gather(
            *(
                _connection(client, number, random.Random(chance.random()))
                for number in range(chance.randrange(1, 4))
            )
        )
    finally:
        await client.close()


async def _connection(client: SpdyClient, number: int, chance: random.Random) -> None:
    headers = (("port", str(chance.choice(PORTS))), ("requestid", str(number)))
    error = await client.open((("streamtype", "error"), *headers))
    stream = await client.open((("streamtype", "data"), *headers))
    data = chance.randbytes(chance.choice(SIZES[1:]))
    if chance.random() < 0.2:
        await stream.write(data)
        await stream.reset()
        return
    ending = asyncio.ensure_future(_send(data, chance, stream.write, stream.end))
    got, text = await asyncio.gather(stream.read_all(), error.read_all())
    await ending
    assert (got, text) == (data, b"")


EXECS = (echo, echo, echo_by_websocket, both_outputs, killed, vanishing_client, leaving_client)
SESSIONS = (*EXECS, *EXECS, *EXECS, forwarded)
"""Each as often as it is here."""


async def _send(
    data: bytes,
    chance: random.Random,
    write: Callable[[bytes], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
) -> None:
    """All of it in pieces of any size, and then the half-close."""
    position = 0
    while position < len(data):
        step = chance.choice((1, 500, 32_768, 100_000))
        await write(data[position : position + step])
        position += step
    await end()


def status_of(channels: dict[int, bytes]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(channels[3])
    return parsed


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def exec_cgroups(container: str) -> list[Path]:
    """Of execs, ended or not."""
    return [
        Path(top) / name
        for top, names, _ in os.walk("/sys/fs/cgroup")  # others' may go meanwhile
        if Path(top).name == container
        for name in names
        if len(name) == 32
    ]
