"""Who may talk to an agent; nothing here depends on the transport."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from hyperpod.agentclient.client import AgentClient
from hyperpod.errors import HyperpodError, ProtocolError, Unavailable
from hyperpod.vsock.dial import dial
from hyperpod.vsock.open import CONTROL_PORT, STDIO_PORT, open_agent
from hyperpod.wire.stdio import FrameType, encode
from tests.agentkit import TIMEOUT, AgentKit, AgentPlace


async def connect(place: AgentPlace, sandbox: str, token: bytes, *, claim: bool) -> None:
    client = AgentClient(place.endpoint, sandbox, token)
    try:
        await client.connect(claim=claim, timeout=TIMEOUT)
        await client.list_containers()
    finally:
        await client.close()


async def test_wrong_token_and_wrong_sandbox(agent: AgentKit) -> None:
    place = agent.place
    for sandbox, token in (
        (place.sandbox_id, secrets.token_bytes(32)),
        (secrets.token_hex(32), place.token),
    ):
        for claim in (False, True):
            with pytest.raises(ProtocolError):
                await connect(place, sandbox, token, claim=claim)
    with pytest.raises(ProtocolError):
        await open_agent(
            place.endpoint, STDIO_PORT, place.sandbox_id, secrets.token_bytes(32), timeout=TIMEOUT
        )
    await connect(place, place.sandbox_id, place.token, claim=False)


async def test_the_same_claim_again_is_welcome_even_with_containers(agent: AgentKit) -> None:
    place = agent.place
    await agent.create("true")
    await connect(place, place.sandbox_id, place.token, claim=True)


@pytest.mark.parametrize("port", [CONTROL_PORT, STDIO_PORT])
@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"HPOD\x02",
        b"HPOD\x01\x07" + bytes(64),
    ],
)
async def test_garbage_instead_of_a_preface_is_cut(agent: AgentKit, port: int, garbage: bytes) -> None:
    loop = asyncio.get_running_loop()
    with await dial(agent.place.endpoint, port, TIMEOUT) as sock:
        await loop.sock_sendall(sock, garbage)
        async with asyncio.timeout(TIMEOUT):
            assert await loop.sock_recv(sock, 100) == b"\x01"
            assert await loop.sock_recv(sock, 100) == b""
    assert await agent.client.list_containers() == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 16,
        encode(FrameType.ACK, 5),
        encode(FrameType.OPEN, 0, b"{}"),
        encode(FrameType.DATA, 0, b"x"),
    ],
)
async def test_garbage_on_the_stdio_port_is_answered_and_cut(agent: AgentKit, garbage: bytes) -> None:
    loop, place = asyncio.get_running_loop(), agent.place
    sock, _ = await open_agent(place.endpoint, STDIO_PORT, place.sandbox_id, place.token, timeout=TIMEOUT)
    with sock:
        await loop.sock_sendall(sock, garbage)
        received = b""
        async with asyncio.timeout(TIMEOUT):
            while data := await loop.sock_recv(sock, 4096):
                received += data
        assert received[0] == FrameType.ERROR


async def test_garbage_on_the_control_port_ends_that_connection_only(agent: AgentKit) -> None:
    loop, place = asyncio.get_running_loop(), agent.place
    sock, _ = await open_agent(place.endpoint, CONTROL_PORT, place.sandbox_id, place.token, timeout=TIMEOUT)
    with sock:
        await loop.sock_sendall(sock, b"\x00" * 1000)
        async with asyncio.timeout(TIMEOUT):
            while await loop.sock_recv(sock, 4096):
                pass
    assert await agent.client.list_containers() == []


async def test_connections_are_bounded_and_come_back(agent: AgentKit) -> None:
    clients: list[AgentClient] = []
    refused = 0
    for _ in range(20):
        client = AgentClient(agent.place.endpoint, agent.place.sandbox_id, agent.place.token)
        try:
            await client.connect(claim=False, timeout=TIMEOUT)
            clients.append(client)
        except (Unavailable, ConnectionError):
            refused += 1
    assert refused == 5  # the fixture's own is the first of 16
    for client in clients:
        await client.close()
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                await connect(agent.place, agent.place.sandbox_id, agent.place.token, claim=False)
                break
            except HyperpodError:
                await asyncio.sleep(0.02)
