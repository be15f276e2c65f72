"""Who may talk to an agent, and what is left behind by one."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from pathlib import Path

import pytest

from hyperpod.agentclient.client import AgentClient
from hyperpod.errors import HyperpodError, ProtocolError, Unavailable
from hyperpod.vsock.dial import dial
from hyperpod.vsock.open import CONTROL_PORT, STDIO_PORT, open_agent
from hyperpod.wire.stdio import FrameType, encode
from tests.agentkit import TIMEOUT, AgentKit, AgentPlace, host_agent


async def connect(place: AgentPlace, sandbox: str, token: bytes, *, claim: bool) -> None:
    client = AgentClient(place.endpoint, sandbox, token)
    await client.connect(claim=claim, timeout=TIMEOUT)
    await client.list_containers()
    await client.close()


async def test_nobody_gets_in_before_a_claim(agent_place: AgentPlace) -> None:
    with pytest.raises(ProtocolError, match="claimed"):
        await connect(agent_place, agent_place.sandbox_id, agent_place.token, claim=False)


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


def cgroups_of(name: str) -> list[str]:
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if f"/hyperpod/{name}" in path]


def processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in command and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


async def until_running(text: str, count: int) -> None:
    """A moment after its start a process shows its own arguments."""
    async with asyncio.timeout(TIMEOUT):
        while len(processes_with(text)) < count:
            await asyncio.sleep(0.02)


def loops_of(image: Path) -> list[str]:
    return [
        str(path)
        for path in Path("/sys/block").glob("loop*/loop/backing_file")
        if path.read_text().strip() == str(image)
    ]


async def test_a_host_agent_leaves_nothing(busybox_layer: Path, tmp_path: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    marker = f"{secrets.randbelow(10**9) + 10**9}"
    async with host_agent(tmp_path, busybox_layer) as place:
        kit = await AgentKit.claim(place)
        ident = await kit.start("sh", "-c", f"sleep {marker} & sleep {marker}")
        await kit.exec(ident, "sleep", marker)
        await kit.create("true")
        await until_running(marker, 3)
        assert loops_of(busybox_layer)
        await kit.client.close()
    assert processes_with(marker) == []
    assert loops_of(busybox_layer) == []
    assert cgroups_of("a") == []
    assert Path("/proc/self/mounts").read_text() == mounts
    left = [p for p in tmp_path.rglob("*") if not p.is_dir() and not p.is_socket()]
    assert left == []


async def test_an_agent_that_was_killed_is_cleaned_up_by_the_next(
    busybox_layer: Path, tmp_path: Path
) -> None:
    marker = f"{secrets.randbelow(10**9) + 10**9}"
    with pytest.raises(AssertionError, match="ended with -9"):
        async with host_agent(tmp_path, busybox_layer) as place:
            kit = await AgentKit.claim(place)
            await kit.start("sleep", marker)
            await until_running(marker, 1)
            await kit.client.close()
            (pid,) = processes_with(str(tmp_path / "a"))
            os.kill(pid, 9)
    assert processes_with(marker)
    for port in (CONTROL_PORT, STDIO_PORT):
        (tmp_path / f"a/{port}.sock").unlink()
    async with host_agent(tmp_path, busybox_layer) as place:
        assert processes_with(marker) == []
        kit = await AgentKit.claim(place)
        assert await kit.client.list_containers() == []
        _, info, _ = await kit.run("true")
        assert info.exit_code == 0
        await kit.client.close()


async def test_shutdown_ends_a_host_agent(busybox_layer: Path, tmp_path: Path) -> None:
    async with host_agent(tmp_path, busybox_layer) as place:
        kit = await AgentKit.claim(place)
        await kit.start("sleep", "1000")
        await kit.client.shutdown()
        async with asyncio.timeout(TIMEOUT):
            while True:
                try:
                    await kit.client.list_containers()
                except Unavailable:
                    break
                await asyncio.sleep(0.02)
        await kit.client.close()
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError):
        probe.connect(str(tmp_path / "a/1024.sock"))
