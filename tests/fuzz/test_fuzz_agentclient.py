"""Random HTTP/2 and gRPC from an agent: every call ends in time, with a value or an error of ours."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from h2.exceptions import H2Error

from hyperpod.agentclient import client as client_module
from hyperpod.agentclient.client import AgentClient
from hyperpod.agentclient.figures import Bounds
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import HyperpodError
from tests.hostilepeer import Call, hostile, message

ROUNDS = int(os.environ.get("HYPERPOD_FUZZ_ROUNDS", "60"))
ID = "cd" * 32

_STATE = v1.ContainerState(id=ID, state=v1.ContainerStatus.EXITED, exit_code=3, finished_at_ns=5)
_REPLIES = {
    "Hello": v1.HelloResponse(api_version=1, agent_version="1", event_seq=3),
    "ListContainers": v1.ListContainersResponse(containers=[_STATE] * 3),
    "Events": v1.Event(seq=9, exited=_STATE),
    "WaitExec": v1.WaitExecResponse(exit_code=7),
}


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with bytes changed, cut out, doubled or made up."""
    raw = bytearray(data)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(4):
            case 0 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                del raw[at : at + rng.randrange(9)]
            case 2:
                raw[at:at] = rng.randbytes(rng.randrange(9))
            case _:
                raw[at:at] = raw[at : at + rng.randrange(40)]
    return bytes(raw)


def misbehave(rng: random.Random, call: Call) -> None:
    """One thing that an agent might send."""
    reply = bytes(_REPLIES.get(call.method, v1.StartContainerResponse(pid=1)))
    match rng.randrange(9):
        case 0:
            call.headers()
        case 1:
            call.data(message(damaged(rng, reply)))
        case 2:
            call.data(damaged(rng, message(reply)))
        case 3:
            call.trailers(("grpc-status", rng.choice(["0", "5", "99", "", "x"])))
        case 4:
            call.headers(("grpc-status", str(rng.randrange(20))), ("grpc-message", "%ff%0a" * 5), end=True)
        case 5:
            stream = rng.choice([0, call.stream, call.stream, 2, 99, 2**31 - 1])
            payload = rng.randbytes(rng.choice([0, 1, 4, 5, 8, 300]))
            call.peer.frame(rng.randrange(14), rng.randrange(256), stream, payload)
        case 6:
            call.peer.h2.reset_stream(call.stream, error_code=rng.randrange(14))
            call.peer.flush()
        case 7:
            call.peer.raw(rng.randbytes(rng.randrange(60)))
        case _:
            call.reply(reply)


async def use(rng: random.Random, client: AgentClient) -> Any:
    match rng.randrange(6):
        case 0:
            return await client.hello(host_time_ns=1, entropy=b"", hostname="h", sysctls={})
        case 1:
            return await client.list_containers()
        case 2:
            return [event async for event in client.events(0)]
        case 3:
            return await client.wait_exec(ID, "e", timeout=0.3)
        case 4:
            return await client.stats(Bounds(memory=1 << 30, disk=1 << 30, cpu_ns=1 << 40), timeout=0.3)
        case _:
            return await client.start_container(ID)


@pytest.mark.parametrize("seed", range(3))
async def test_random_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(client_module, "SHORT", 0.3)
    monkeypatch.setattr(client_module, "LONG", 0.3)
    rng = random.Random(seed)
    stray: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(repr(context)))

    async def script(call: Call) -> None:
        for _ in range(rng.randrange(1, 5)):
            try:
                misbehave(rng, call)
            except H2Error:  # our own h2 keeps us from worse on this stream
                call.peer.raw(rng.randbytes(20))
        if call.method == "Events" or rng.randrange(3) == 0:
            call.peer.writer.close()

    outcomes: set[str] = set()
    for _ in range(ROUNDS):
        async with hostile(tmp_path, script) as (agent, client):
            for _ in range(3):
                try:
                    async with asyncio.timeout(20):
                        await use(rng, client)
                    outcomes.add("value")
                except HyperpodError as exc:
                    assert len(str(exc)) < 5000
                    outcomes.add(type(exc).__name__)
            assert [e for e in agent.errors if not isinstance(e, H2Error)] == []
    assert stray == []
    assert {"value", "ConnectionLost"} < outcomes
