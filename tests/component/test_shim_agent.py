"""The shim with a real agent and real containers: what they print is in the log, once, whoever is killed."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperpod.shim.collect import END, STDERR, STDOUT
from hyperpod.shimclient.client import ShimClient
from tests.agentkit import AgentKit
from tests.shimkit import WAIT, SupervisorProcess, opened, payload, supervisor

LINES = 2_000_000


class AgentPod:
    """A shim for the agent's sandbox."""

    def __init__(self, agent: AgentKit, parent: SupervisorProcess) -> None:
        self.agent, self.parent = agent, parent
        self.id = agent.place.sandbox_id
        self.directory = parent.run_dir / "s" / self.id[:12]
        self.directory.mkdir(mode=0o700)
        self.log = parent.run_dir / "container.log"
        self.shim = ShimClient(str(self.directory / "control.sock"))

    async def spawn(self, container: str = "") -> None:
        """Fork a shim (the next one), and have it go on with the container's log."""
        await self.shim.close()
        async with self.parent.client() as client:
            await client.spawn_shim(
                sandbox_id=self.id, directory=str(self.directory), uid=0, gid=0, device=False, resume=True
            )
        self.shim = ShimClient(str(self.directory / "control.sock"))
        await self.shim.connect(WAIT)
        await self.shim.agent(self.agent.place.endpoint, self.agent.place.token)
        if container:
            with opened(self.log) as fd:
                await self.shim.log_start(container, tty=False, fd=fd)

    async def kill(self) -> None:
        os.kill((await self.shim.hello()).pid, signal.SIGKILL)
        await self.shim.closed.wait()


@pytest.fixture
async def one(agent: AgentKit) -> AsyncIterator[AgentPod]:
    with supervisor() as parent:
        made = AgentPod(agent, parent)
        await made.spawn()
        try:
            yield made
        finally:
            await made.shim.close()


async def test_a_containers_life_is_in_its_log(one: AgentPod) -> None:
    container = await one.agent.create("sh", "-c", "echo out; echo err >&2; printf 'no end'; exit 3")
    await one.spawn(container)
    await one.agent.client.start_container(container)
    assert (await one.agent.exit_of(container)).exit_code == 3
    assert (await one.shim.log_finish(container, WAIT)).complete
    log = one.log.read_bytes()
    assert payload(log) == b"out\nno end"
    assert payload(log, b"stderr") == b"err\n"


async def test_every_line_once_while_shims_are_killed(one: AgentPod) -> None:
    container = await one.agent.create("sh", "-c", f"seq {LINES}; seq 1000 >&2")
    await one.spawn(container)
    await one.agent.client.start_container(container)
    chance, kills, rotated = random.Random(3), 0, list[Path]()
    # Longer lives with time: on a busy machine none would be long enough to get anywhere otherwise.
    while not (await one.shim.log_finish(container, chance.random() * 0.05 * (1 + kills / 20))).complete:
        await one.kill()
        kills += 1
        if kills % 3 == 0:
            rotated.append(one.log.with_suffix(f".{kills}"))
            one.log.rename(rotated[-1])
        await one.spawn(container)
    log = b"".join(file.read_bytes() for file in (*rotated, one.log))
    assert payload(log) == b"".join(b"%d\n" % i for i in range(1, LINES + 1))
    assert payload(log, b"stderr") == b"".join(b"%d\n" % i for i in range(1, 1001))
    assert kills > 3
    assert (await one.agent.exit_of(container)).exit_code == 0


async def test_a_dead_agent_leaves_a_log_of_whole_records(one: AgentPod) -> None:
    # By one write(2): what is in the log says that the rest has come, too.
    container = await one.agent.create("sh", "-c", "printf 'first\\nand then'; exec sleep 1000")
    await one.spawn(container)
    await one.agent.client.start_container(container)
    async with asyncio.timeout(WAIT):
        while not one.log.stat().st_size:
            await asyncio.sleep(0.01)
    end = await one.shim.log_finish(container, 0.5)
    assert not end.complete
    assert payload(one.log.read_bytes()) == b"first\nand then"
    await one.agent.client.remove_container(container)


async def test_an_execs_output_is_collected(one: AgentPod) -> None:
    container = await one.agent.start("sleep", "1000")
    exec_id = await one.agent.exec(container, "sh", "-c", "seq 100000; echo bad >&2")
    got = await collected(one, container, exec_id)
    assert got[STDOUT] == b"".join(b"%d\n" % i for i in range(1, 100_001))
    assert got[STDERR] == b"bad\n"
    small = await one.agent.exec(container, "sh", "-c", "seq 1000; echo bad >&2")
    # As when a shim died after all but the last record.
    first, again = [await collected(one, container, small) for _ in range(2)]
    assert first == again
    assert again[STDOUT] == b"".join(b"%d\n" % i for i in range(1, 1001))
    await one.agent.client.remove_container(container)


async def collected(one: AgentPod, container: str, exec_id: str) -> dict[int, bytes]:
    """What the shim hands on, by kind."""
    ours, theirs = socket.socketpair()
    with theirs:
        await one.shim.collect(container, exec_id, tty=False, limit=1 << 24, fd=theirs.fileno())
    reader, writer = await asyncio.open_connection(sock=ours)
    got = {STDOUT: b"", STDERR: b"", END: b""}
    async with asyncio.timeout(WAIT):
        while True:
            kind, length = struct.unpack("!BI", await reader.readexactly(5))
            got[kind] += await reader.readexactly(length)
            if kind == END:
                break
    writer.close()
    return got


async def test_a_stranger_gets_no_stream(one: AgentPod) -> None:
    """With another token the agent refuses, and the log tells that it is not complete."""
    container = await one.agent.create("echo", "secret")
    await one.shim.agent(one.agent.place.endpoint, secrets.token_bytes(32))
    with opened(one.log) as fd:
        await one.shim.log_start(container, tty=False, fd=fd)
    await one.agent.client.start_container(container)
    assert not (await one.shim.log_finish(container, 0.5)).complete
    assert one.log.read_bytes() == b""
    await one.shim.agent(one.agent.place.endpoint, one.agent.place.token)
    assert (await one.shim.log_finish(container, WAIT)).complete
    assert payload(one.log.read_bytes()) == b"secret\n"
