"""The server kit against an independent client (grpcio, Google's C core): each defect of grpclib it works round."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.errors import FailedPrecondition, NotFound
from hyperpod.rpc.server import MESSAGE_LIMIT, RpcServer

PREFIX = "/runtime.v1.RuntimeService/"


class Service(cri.RuntimeServiceBase):
    """Answers as the test tells it to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.running = 0
        self.big = "x"

    async def version(self, message: cri.VersionRequest) -> cri.VersionResponse:
        return cri.VersionResponse(version="0.1.0", runtime_name=self.big)

    async def stop_container(self, message: cri.StopContainerRequest) -> cri.StopContainerResponse:
        self.running += 1
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        return cri.StopContainerResponse()

    async def start_container(self, message: cri.StartContainerRequest) -> cri.StartContainerResponse:
        match message.container_id:
            case "missing":
                raise NotFound("no container 'missing'")
            case "group":
                raise ExceptionGroup("several", [ValueError("x"), NotFound("in a group")])
            case "key":
                raise KeyError("secret detail")
            case "late":
                raise TimeoutError
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


@asynccontextmanager
async def channel(path: Path, **options: int) -> AsyncIterator[grpc.aio.Channel]:
    pairs = [(f"grpc.{key}", value) for key, value in options.items()]
    async with grpc.aio.insecure_channel(f"unix:{path}", options=pairs) as made:
        yield made


async def call(made: grpc.aio.Channel, method: str, body: bytes = b"", **more: object) -> bytes:
    raw = made.unary_unary(PREFIX + method)
    return bytes(await raw(body, timeout=20, **more))


async def code(made: grpc.aio.Channel, method: str, body: bytes = b"", **more: object) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await call(made, method, body, **more)
    return info.value.code().name, info.value.details() or ""


async def test_unknown_methods_are_unimplemented() -> None:
    async with server() as (_, _, path), channel(path) as made:
        assert await code(made, "NoSuchThing") == (
            "UNIMPLEMENTED",
            "no method /runtime.v1.RuntimeService/NoSuchThing",
        )
        assert b"0.1.0" in await call(made, "Version")


async def test_errors_are_mapped_once() -> None:
    def request(ident: str) -> bytes:
        return bytes(cri.StartContainerRequest(container_id=ident))

    async with server() as (_, _, path), channel(path) as made:
        assert await code(made, "StartContainer", request("missing")) == (
            "NOT_FOUND",
            "no container 'missing'",
        )
        assert await code(made, "StartContainer", request("group")) == ("NOT_FOUND", "in a group")
        assert (await code(made, "StartContainer", request("late")))[0] == "DEADLINE_EXCEEDED"
        status, text = await code(made, "StartContainer", request("key"))
        assert status == "INTERNAL"
        assert "secret" not in text
        assert (await code(made, "StartContainer", b"\x0a\xff\xff"))[0] == "INVALID_ARGUMENT"


async def test_more_than_a_hundred_calls_do_not_starve_the_next() -> None:
    async with server() as (service, _, path), channel(path) as made:
        slow = [asyncio.ensure_future(call(made, "StopContainer")) for _ in range(300)]
        while service.running < 300:
            await asyncio.sleep(0.01)
        assert b"0.1.0" in await call(made, "Version")
        service.go.set()
        await asyncio.gather(*slow)


async def test_requests_over_the_limit_are_refused_before_they_are_kept() -> None:
    async with server() as (_, _, path), channel(path, max_send_message_length=-1) as made:
        status, text = await code(made, "Version", b"\0" * (MESSAGE_LIMIT + 1))
        assert status == "RESOURCE_EXHAUSTED"
        assert str(MESSAGE_LIMIT) in text
        assert b"0.1.0" in await call(made, "Version")


async def test_compression_is_refused_with_a_reason() -> None:
    async with server() as (_, _, path), channel(path) as made:
        status, text = await code(made, "Version", b"", compression=grpc.Compression.Gzip)
        assert status == "UNIMPLEMENTED"
        assert "gzip" in text


async def test_a_client_that_vanishes_while_writing_is_paused_leaks_nothing() -> None:
    async with server() as (service, rpc, path):
        service.big = "x" * (12 * 1024 * 1024)
        async with channel(path, max_receive_message_length=-1) as made:
            raw = made.unary_unary(PREFIX + "Version")
            calls = [raw(b"", timeout=20) for _ in range(8)]
            await asyncio.sleep(0.2)
            for one in calls:
                one.cancel()
        for _ in range(300):
            if not rpc._server.running():
                break
            await asyncio.sleep(0.02)
        assert rpc._server.running() == []


async def test_close_drains_then_tells_the_rest() -> None:
    async with server() as (service, rpc, path), channel(path) as made:
        drained = asyncio.ensure_future(call(made, "StopContainer"))
        while not service.running:
            await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(rpc.close(20))
        await asyncio.sleep(0.05)
        assert not path.exists()
        service.go.set()
        await drained
        await closing
    async with server() as (service, rpc, path), channel(path) as made:
        stuck = asyncio.ensure_future(code(made, "StopContainer"))
        while not service.running:
            await asyncio.sleep(0.01)
        await rpc.close(0.1)
        assert (await stuck)[0] == "UNAVAILABLE"


async def test_a_live_socket_is_not_stolen_and_a_stale_one_is_replaced() -> None:
    async with server() as (_, _, path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(FailedPrecondition, match="listens on"):
            await RpcServer([Service()]).listen(path)
        stale = path.with_name("stale")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(stale))
        rpc = RpcServer([Service()])
        await rpc.listen(stale)
        await rpc.close(1)
