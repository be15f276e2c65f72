"""Dialing: every kind of endpoint that exists without a VM, and what goes wrong."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from hyperpod.errors import DeadlineExceeded, InvalidArgument, Unavailable, Unsupported
from hyperpod.vsock import kernel
from hyperpod.vsock.dial import (
    Endpoint,
    HostEndpoint,
    HybridEndpoint,
    KernelEndpoint,
    dial,
    endpoint_from_json,
    endpoint_to_json,
)


@pytest.mark.parametrize("endpoint", [HybridEndpoint("/a"), KernelEndpoint(7), HostEndpoint("/b")])
def test_endpoints_survive_json(endpoint: Endpoint) -> None:
    assert endpoint_from_json(endpoint_to_json(endpoint)) == endpoint


@pytest.mark.parametrize(
    "data", [{}, {"kind": "hybrid"}, {"kind": "kernel", "cid": "3"}, {"kind": "x", "path": ""}]
)
def test_other_json_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        endpoint_from_json(data)


async def answering(path: Path, answer: bytes) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"CONNECT 1024\n"
        writer.write(answer)
        await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(serve, path)


async def test_nothing_behind_the_answer_is_lost(tmp_path: Path) -> None:
    server = await answering(tmp_path / "s", b"OK 5\nfirst bytes")
    sock = await dial(HybridEndpoint(str(tmp_path / "s")), 1024, 5)
    assert not sock.getblocking()
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"first bytes"
    sock.close()
    server.close()


@pytest.mark.parametrize("answer", [b"", b"ER", b"NO\n", b"O" * 100])
async def test_no_ok_is_unavailable(tmp_path: Path, answer: bytes) -> None:
    server = await answering(tmp_path / "s", answer)
    with pytest.raises(Unavailable):
        await dial(HybridEndpoint(str(tmp_path / "s")), 1024, 5)
    server.close()


async def test_silence_is_a_deadline(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with pytest.raises(DeadlineExceeded):
        await dial(HybridEndpoint(str(tmp_path / "s")), 1024, 0.05)
    listener.close()


async def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "1024.sock"))
    listener.listen(0)
    endpoint = HostEndpoint(str(tmp_path))
    first = await dial(endpoint, 1024, 5)
    second = asyncio.create_task(dial(endpoint, 1024, 5))
    await asyncio.sleep(0.02)
    assert not second.done()
    listener.accept()[0].close()
    (await second).close()
    first.close()
    listener.close()


@pytest.mark.parametrize("endpoint", [HybridEndpoint("/nonexistent/s"), HostEndpoint("/nonexistent")])
async def test_nobody_there_is_unavailable(endpoint: Endpoint) -> None:
    with pytest.raises(Unavailable, match="cannot connect to /nonexistent"):
        await dial(endpoint, 1024, 5)


async def test_a_guest_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await dial(KernelEndpoint(0xFFFFFFF0), 1024, 5)


def test_without_the_kernel_device(tmp_path: Path) -> None:
    missing = str(tmp_path / "vhost-vsock")
    assert not kernel.available(missing)
    with pytest.raises(Unsupported, match="vhost-vsock"):
        kernel.free_cid(device=missing)
