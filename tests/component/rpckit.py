"""A server with a service that does as it is told, and two independent clients: grpcio, and bare HTTP/2 frames."""

from __future__ import annotations

import asyncio
import socket
import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event, RemoteSettingsChanged, ResponseReceived, TrailersReceived
from h2.settings import SettingCodes
from hyperframe.frame import Frame

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.errors import NotFound
from hyperpod.rpc.interceptor import about
from hyperpod.rpc.server import RpcServer

PREFIX = "/runtime.v1.RuntimeService/"


class Service(cri.RuntimeServiceBase):
    """Version answers; StopContainer waits for `go`; StartContainer fails as its container id says."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.running = 0
        self.cleaned = 0
        self.big = "x"
        self.called = asyncio.Event()

    async def version(self, message: cri.VersionRequest) -> cri.VersionResponse:
        self.called.set()
        return cri.VersionResponse(version="0.1.0", runtime_name=self.big)

    async def stop_container(self, message: cri.StopContainerRequest) -> cri.StopContainerResponse:
        self.running += 1
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        return cri.StopContainerResponse()

    async def remove_container(self, message: cri.RemoveContainerRequest) -> cri.RemoveContainerResponse:
        """Waits for `go` with a clean-up that awaits."""
        self.running += 1
        try:
            await self.go.wait()
        finally:
            self.running -= 1
            await asyncio.sleep(0.3)
            self.cleaned += 1
        return cri.RemoveContainerResponse()

    async def start_container(self, message: cri.StartContainerRequest) -> cri.StartContainerResponse:
        about(message.container_id)
        match message.container_id:
            case "missing":
                raise NotFound("no container 'missing': \N{SNOWMAN} 100%")
            case "group":
                raise ExceptionGroup("several", [ValueError("x"), NotFound("in a group")])
            case "key":
                raise KeyError("secret detail")
            case "late":
                raise TimeoutError
            case "cancelled":
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
        return cri.StartContainerResponse()


@asynccontextmanager
async def server() -> AsyncIterator[tuple[Service, RpcServer, Path]]:
    with tempfile.TemporaryDirectory(prefix="hyperpod-rpc-") as folder:
        service, path = Service(), Path(folder) / "s"
        rpc = RpcServer([service])
        await rpc.listen(path)
        try:
            yield service, rpc, path
        finally:
            service.go.set()
            await rpc.close(5)


async def until_idle(rpc: RpcServer) -> None:
    """Raises TimeoutError when a call does not end."""
    async with asyncio.timeout(60):
        while rpc.running():
            await asyncio.sleep(0.01)


async def until_running(service: Service, count: int) -> None:
    async with asyncio.timeout(60):
        while service.running < count:
            await asyncio.sleep(0.01)


# -- grpcio ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def channel(path: Path, **options: int) -> AsyncIterator[grpc.aio.Channel]:
    pairs = [(f"grpc.{key}", value) for key, value in options.items()]
    async with grpc.aio.insecure_channel(f"unix:{path}", options=pairs) as made:
        yield made


async def call(made: grpc.aio.Channel, method: str, body: bytes = b"", **more: object) -> bytes:
    raw = made.unary_unary(PREFIX + method)
    return bytes(await raw(body, **{"timeout": 60, **more}))


async def code(made: grpc.aio.Channel, method: str, body: bytes = b"", **more: object) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await call(made, method, body, **more)
    return info.value.code().name, info.value.details() or ""


# -- bare frames -------------------------------------------------------------------------------------------


class Bare:
    """One connection whose frames the test makes itself, with windows that never end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
        self.h2.increment_flow_control_window(2**31 - 1 - 65535)

    async def flush(self) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, self.h2.data_to_send())

    async def request(
        self, stream: int, method: str, data: bytes | None = struct.pack("!BI", 0, 0), **headers: str
    ) -> None:
        """The headers, then the data with the stream's end; None: the end at once."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": PREFIX + method,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        self.h2.send_headers(stream, list(fields.items()), end_stream=data is None)
        if data is not None:
            self.h2.send_data(stream, data, end_stream=True)
        await self.flush()

    async def reset(self, stream: int) -> None:
        self.h2.reset_stream(stream, error_code=8)
        await self.flush()

    async def events(self) -> AsyncIterator[Event]:
        """All to the connection's end."""
        loop = asyncio.get_running_loop()
        while data := await asyncio.wait_for(loop.sock_recv(self.sock, 1 << 16), 60):
            for event in self.h2.receive_data(data):
                yield event

    async def answer(self) -> dict[str, str]:
        """The headers that carry the next call's status."""
        async for event in self.events():
            if isinstance(event, ResponseReceived | TrailersReceived):
                headers = {str(name): str(value) for name, value in event.headers or ()}
                if "grpc-status" in headers:
                    return headers
        raise EOFError

    async def setting(self, wanted: SettingCodes, value: int) -> None:
        """Wait until the server sets it so. Raises EOFError."""
        async for event in self.events():
            changes = event.changed_settings if isinstance(event, RemoteSettingsChanged) else {}
            if wanted in changes and changes[wanted].new_value == value:
                return
        raise EOFError

    async def frames(self) -> list[Frame]:
        """All to the connection's end, for what h2's state machine would not take: it knows one GOAWAY only."""
        loop, raw, found = asyncio.get_running_loop(), b"", []
        while data := await asyncio.wait_for(loop.sock_recv(self.sock, 1 << 16), 60):
            raw += data
        while raw:
            frame, length = Frame.parse_frame_header(memoryview(raw[:9]))
            frame.parse_body(memoryview(raw[9 : 9 + length]))
            raw = raw[9 + length :]
            found.append(frame)
        return found


@asynccontextmanager
async def bare(path: Path) -> AsyncIterator[Bare]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        client = Bare(sock)
        await client.flush()
        yield client
