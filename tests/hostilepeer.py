"""An agent that does as it is told, wrongly: the preface, then HTTP/2 frames of the test's choice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived

from hyperpod.agentclient.client import AgentClient
from hyperpod.vsock.dial import HostEndpoint
from hyperpod.vsock.open import CONTROL_PORT
from hyperpod.wire.preface import NONCE_LEN, AgentPreface, Identity

HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]


def message(payload: bytes) -> bytes:
    """In gRPC's framing."""
    return struct.pack(">BI", 0, len(payload)) + payload


class Call:
    """One request of the client, to be answered."""

    def __init__(self, peer: Peer, path: str, stream: int) -> None:
        self.peer, self.method, self.stream = peer, path.rpartition("/")[2], stream

    def headers(self, *more: tuple[str, str], end: bool = False) -> None:
        self.peer.h2.send_headers(self.stream, [*HEADERS, *more], end_stream=end)
        self.peer.flush()

    def data(self, data: bytes) -> None:
        """As far as the client's windows go."""
        while data and (room := self.peer.h2.local_flow_control_window(self.stream)) > 0:
            step = min(room, len(data), self.peer.h2.max_outbound_frame_size)
            self.peer.h2.send_data(self.stream, data[:step])
            data = data[step:]
        self.peer.flush()

    def trailers(self, *headers: tuple[str, str]) -> None:
        self.peer.h2.send_headers(self.stream, list(headers or OK), end_stream=True)
        self.peer.flush()

    def reply(self, payload: bytes) -> None:
        self.headers()
        self.data(message(payload))
        self.trailers()


Script = Callable[[Call], Awaitable[None]]


class Peer:
    """One connection to the hostile agent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = H2Connection(
            config=H2Configuration(
                client_side=False,
                header_encoding="ascii",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.h2.initiate_connection()

    def flush(self) -> None:
        self.raw(self.h2.data_to_send())

    def raw(self, data: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(data)

    def frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Any frame at all (RFC 9113, 4.1)."""
        self.raw(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    async def calls(self) -> AsyncIterator[Call]:
        """Requests that are complete, until the client leaves."""
        self.flush()
        paths: dict[int, str] = {}
        while data := await self.reader.read(65536):
            for event in self.h2.receive_data(data):
                if isinstance(event, RequestReceived):
                    paths[event.stream_id] = str(dict(event.headers)[":path"])  # type: ignore[index]
                elif isinstance(event, DataReceived):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    if event.stream_ended is not None:
                        yield Call(self, paths[event.stream_id], event.stream_id)
            self.flush()


class HostileAgent:
    """Listens like a host agent; `script` answers each call."""

    def __init__(self, directory: Path, script: Script) -> None:
        self.directory, self.script = directory, script
        self.sandbox, self.token = secrets.token_hex(32), secrets.token_bytes(32)
        self.endpoint = HostEndpoint(str(directory))
        self.errors: list[Exception] = []
        self.connections = 0
        self._identity = Identity()

    def client(self) -> AgentClient:
        return AgentClient(self.endpoint, self.sandbox, self.token)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            preface = AgentPreface(self._identity, nonce=os.urandom(NONCE_LEN))
            while not preface.done:
                if not (data := await reader.read(1)):  # one byte: nothing of HTTP/2 may be taken
                    return
                writer.write(preface.feed(data))
            async for call in Peer(reader, writer).calls():
                await self.script(call)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client left
        except Exception as exc:  # noqa: BLE001  # told by the test, which sees it as a failure
            self.errors.append(exc)
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[HostileAgent]:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        path = str(self.directory / f"{CONTROL_PORT}.sock")
        Path(path).unlink(missing_ok=True)
        server = await asyncio.start_unix_server(accept, path)
        try:
            yield self
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def hostile(directory: Path, script: Script) -> AsyncIterator[tuple[HostileAgent, AgentClient]]:
    """A hostile agent and a client that has claimed it."""
    async with HostileAgent(directory, script)() as agent:
        client = agent.client()
        await client.connect(claim=True, timeout=20)
        try:
            yield agent, client
        finally:
            await client.close()
