"""Clients of streams that mean harm, or are odd: what they cost others, and what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
from wsproto.events import BytesMessage

from hyperpod.cli.streamclient import SpdyClient
from hyperpod.cli.upgrade import upgraded
from hyperpod.config import StreamingConfig
from hyperpod.vsock.open import STDIO_PORT, open_agent
from hyperpod.wire import spdy
from hyperpod.wire.portforward import MAX_CONNECTIONS
from hyperpod.wire.portpipe import HostPort
from hyperpod.wire.spdy import frames
from tests.agentkit import TIMEOUT, AgentKit, agent_pid
from tests.component.test_portforward import Forward, echo, listening
from tests.shimkit import eventually
from tests.streamkit import ALL, Command, StreamPod, WebSocket, stream_pod

SPDY = [
    ("Connection", "Upgrade"),
    ("Upgrade", "SPDY/3.1"),
    ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
]
FLOODING = """
import socket, sys, threading
sock, data = socket.socket(fileno=int(sys.argv[1])), bytes.fromhex(sys.argv[2]) * 10_000

def read():
    while sock.recv(1 << 20):
        pass

threading.Thread(target=read, daemon=True).start()
while True:
    sock.sendall(data)
"""


@pytest.fixture
async def pod(agent: AgentKit) -> AsyncIterator[StreamPod]:
    async with stream_pod(agent, StreamingConfig()) as made:
        yield made


@contextmanager
def flooding(sock: socket.socket, data: bytes) -> Iterator[None]:
    """A process that sends `data` over and over, and reads what is answered."""
    sock.setblocking(True)
    argv = [sys.executable, "-c", FLOODING, str(sock.fileno()), data.hex()]
    with sock, subprocess.Popen(argv, pass_fds=[sock.fileno()], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.mark.parametrize(
    "data", [frames.ping(1), frames.data_header(101, 1, fin=False) + b"x"], ids=["pings", "data"]
)
async def test_a_flood_of_frames_does_not_stop_the_shim(pod: StreamPod, data: bytes) -> None:
    container = await pod.run("sleep", "1000")
    sock, _ = await upgraded(pod.exec_url(container, "cat", wanted=ALL), SPDY)
    with flooding(sock, data):
        await asyncio.sleep(0.5)
        async with asyncio.timeout(TIMEOUT):
            for _ in range(5):
                await pod.shim.hello()


async def test_connections_that_are_given_up_at_once_take_no_places(pod: StreamPod) -> None:
    """In a tunnel, so that the reset is read after the dial and before anything of it has happened."""
    web = await WebSocket.connect(pod.forward_url(), "SPDY/3.1+portforward.k8s.io")
    client, loop = spdy.Connection(spdy.Role.CLIENT), asyncio.get_running_loop()

    def message() -> bytes:
        return web._connection.send(BytesMessage(b"".join(client.data_to_send())))

    def opened(port: int, request: str) -> tuple[int, int]:
        headers = (("port", str(port)), ("requestid", request))
        error = client.open_stream((("streamtype", "error"), *headers), fin=True)
        return error, client.open_stream((("streamtype", "data"), *headers))

    async with listening(echo) as port, asyncio.timeout(TIMEOUT):

        async def alive(request: str) -> None:
            _, data = opened(port, request)
            client.send_data(data, b"alive", fin=True)
            await loop.sock_sendall(web._sock, message())
            got: list[spdy.Event] = []
            while spdy.StreamEnded(data) not in got:
                got += client.receive_data(await anext(messages))
            parts = [e.data for e in got if isinstance(e, spdy.DataReceived) and e.stream == data]
            assert b"".join(parts) == b"alive"

        messages = web.messages()
        for index in range(MAX_CONNECTIONS + 1):
            _, data = opened(port, str(index))
            dial = message()
            client.reset(data)
            await loop.sock_sendall(web._sock, dial + message())
            if index % 100 == 0:  # else they may all be read in one turn, with none of them ended
                await alive(f"{index}-alive")
        await alive("last")
    web.close()


async def test_sessions_share_the_places_of_their_pod(pod: StreamPod) -> None:
    """So that port-forwards leave the agent room for logs and execs."""
    async with listening(echo) as port, asyncio.timeout(TIMEOUT):
        first = Forward(await SpdyClient.connect(pod.forward_url(), "portforward.k8s.io"))
        await asyncio.gather(*(first.connect(port) for _ in range(MAX_CONNECTIONS)))
        second = Forward(await SpdyClient.connect(pod.forward_url(), "portforward.k8s.io"))
        error, _ = await second.connect(port)
        assert b"512 forwarded connections already" in await error.read_all()
        await first.client.close()
        while True:  # until those of the first have ended
            error, stream = await second.connect(port)
            await stream.end()
            if not (text := await error.read_all()):
                break
            assert b"512 forwarded connections already" in text
            await asyncio.sleep(0.1)
        assert await second.roundtrip(port, b"room") == b"room"
        await second.client.close()


async def test_a_host_that_leaves_a_port_which_does_not_read(agent: AgentKit) -> None:
    """By frames, as in a guest. The agent reads nothing more from the host then, so nothing tells it of the end."""
    accepted, done = asyncio.Event(), asyncio.Event()

    async def reads_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await done.wait()
        writer.transport.abort()

    place, loop = agent.place, asyncio.get_running_loop()
    guest = agent_pid(place)
    before = len(os.listdir(f"/proc/{guest}/fd"))
    async with listening(reads_nothing) as port, asyncio.timeout(TIMEOUT):
        sock, _ = await open_agent(place.endpoint, STDIO_PORT, place.sandbox_id, place.token, timeout=TIMEOUT)
        pipe = HostPort(port)
        await loop.sock_sendall(sock, pipe.start())
        await accepted.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await loop.sock_sendall(sock, b"".join(pipe.data(bytes(30_000_000))))
        assert len(os.listdir(f"/proc/{guest}/fd")) > before
        sock.close()
        await eventually(lambda: len(os.listdir(f"/proc/{guest}/fd")) <= before)
        done.set()


async def test_input_of_one_byte_a_frame_is_bounded_in_memory(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    shim = (await pod.shim.hello()).pid
    command = await Command.open(pod.exec_url(container, "sleep", "1000", wanted=ALL), ALL)
    before = resident(shim)
    frame = frames.data_header(command.streams["stdin"].number, 1, fin=False) + b"x"
    command.client._reader.cancel()
    with flooding(command.client._socket._sock.dup(), frame):
        await asyncio.sleep(8)
        assert resident(shim) - before < 32 << 20
    command.client.abort()


def resident(pid: int) -> int:
    """Bytes of memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
