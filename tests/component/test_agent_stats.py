"""Statistics of an agent's containers: true ones of a host agent, and lies that are caught."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
from pathlib import Path

import pytest

from hyperpod.agent import stats as stats_of
from hyperpod.agent.stats import PAGE
from hyperpod.agentclient.figures import Bounds, SandboxFigures
from hyperpod.api.gen.hyperpod.agent.v1 import StatsResponse
from hyperpod.api.gen.hyperpod.agentstats import v1
from hyperpod.errors import DeadlineExceeded, GuestError, HyperpodError
from hyperpod.model.security import LinuxResources
from hyperpod.spec.oci import ContainerSpecInput
from tests.agentkit import AgentKit
from tests.hostilepeer import Call, Script, hostile

MIB = 1 << 20
MOST = Bounds(memory=1 << 50, disk=1 << 50, cpu_ns=1 << 62)


async def stats(agent: AgentKit, details: bool = False) -> SandboxFigures:
    return await agent.client.stats(MOST, details=details)


async def test_a_busy_and_hungry_container_is_seen(agent: AgentKit) -> None:
    script = "head -c 3000000 /dev/zero > /tmp/big; echo up; while :; do :; done"
    spec = ContainerSpecInput(
        args=("sh", "-c", script), resources=LinuxResources(memory_limit=64 * MIB, unified={})
    )
    created = await agent.create("true")
    ident = await agent.create(spec=spec)
    await agent.client.start_container(ident)
    async with agent.output(ident) as out:
        await out.read_until(b"up")
    before = await stats(agent)
    async with asyncio.timeout(30):  # on a busy host it has little of a CPU
        while True:
            after = await stats(agent, details=True)
            old, new = before.containers[ident].cgroup, after.containers[ident].cgroup
            assert old is not None and new is not None
            if new.cpu_usage_ns - old.cpu_usage_ns > 100_000_000:
                break
            await asyncio.sleep(0.2)
    assert set(before.containers) == set(after.containers) == {created, ident}
    assert after.containers[created].cgroup is None, "not started: nothing but its writable folder"
    assert after.containers[created].writable is not None
    assert new.cpu_usage_ns - old.cpu_usage_ns < 100_000_000_000, "nanoseconds"
    assert 0 < new.working_set <= new.memory_usage <= 64 * MIB
    assert new.memory_limit == 64 * MIB
    assert new.pids >= 1
    assert new.page_faults > 0
    writable, details = after.containers[ident].writable, after.containers[ident].details
    assert writable is not None and writable[0] >= 3_000_000 and writable[1] >= 3
    assert details is not None
    assert (details.processes, details.threads) == (1, 1)
    assert details.file_descriptors >= 3 and details.files_max > 0
    guest = after.guest
    assert guest.memory_total > guest.memory_available > 0
    assert guest.containers is not None
    assert guest.containers.cpu_usage_ns >= old.cpu_usage_ns, "it was read before the container"
    assert guest.disk_size > guest.disk_free > 0
    await agent.client.remove_container(ident)
    assert set((await stats(agent)).containers) == {created}


async def test_open_files_are_counted_without_listing_all(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    held = [*socket.socketpair(), *socket.socketpair()]
    fds = [sock.fileno() for sock in held] + [os.dup(read) for _ in range(100)]
    waiting = ["sh", "-c", "echo up; read x"]
    with subprocess.Popen(waiting, stdin=read, stdout=subprocess.PIPE, pass_fds=fds) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"  # it has loaded its libraries
            listed = len(os.listdir(f"/proc/{process.pid}/fd"))
            assert listed == 3 + len(fds)
            assert stats_of.open_files([process.pid, process.pid]) == (2 * listed, 2 * len(held))
            monkeypatch.setattr(stats_of, "MAX_LINKS", listed)
            assert stats_of.open_files([process.pid, process.pid]) == (2 * listed, len(held))
        finally:
            process.kill()
    for fd in (read, write, *fds[len(held) :]):
        os.close(fd)
    for sock in held:
        sock.close()


async def test_more_containers_than_a_page_holds(agent: AgentKit) -> None:
    idents = {await agent.create("true") for _ in range(PAGE + 3)}
    assert set((await stats(agent, details=True)).containers) == idents


async def test_statistics_while_containers_come_and_go(agent: AgentKit) -> None:
    async def churn() -> None:
        for _ in range(8):
            ident, info, _ = await agent.run("true")
            assert info.exit_code == 0
            await agent.client.remove_container(ident)

    working = asyncio.gather(*(churn() for _ in range(3)))
    answers = 0
    while not working.done():
        await stats(agent, details=True)
        answers += 1
    await working
    assert answers > 5
    assert (await stats(agent)).containers == {}


async def test_limits_are_those_of_the_cgroups_above_as_well(agent: AgentKit) -> None:
    ident = await agent.start("sleep", "1000")
    await agent.client.update_container(ident, json.dumps({"memory": {"limit": 8 << 40}}).encode())
    figures = (await stats(agent)).containers[ident].cgroup
    assert figures is not None
    guest = (await stats(agent)).guest.containers
    assert guest is not None
    assert figures.memory_limit <= (guest.memory_limit or 8 << 40)


def replying(payload: bytes) -> Script:
    async def script(call: Call) -> None:
        call.reply(bytes(StatsResponse(page=payload)))

    return script


def page(*idents: str, more: bool = False, guest: bool = True) -> bytes:
    containers = [v1.ContainerStats(id=ident) for ident in idents]
    return bytes(v1.Page(guest=v1.GuestStats() if guest else None, containers=containers, more=more))


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    "payload",
    [
        page(guest=False),
        page("x" * 64),
        page(A[:-1]),
        page(B, A),
        page(A, A),
        page(A, more=True),  # again and again
        bytes(v1.Page(guest=v1.GuestStats(interfaces=[v1.InterfaceStats(name="a\nb")]))),
        bytes(
            v1.Page(
                guest=v1.GuestStats(),
                containers=[
                    v1.ContainerStats(
                        id=A, details=v1.DetailStats(hugetlb=[v1.HugetlbStats(page_size="/etc")])
                    )
                ],
            )
        ),
    ],
)
async def test_answers_that_cannot_be(tmp_path: Path, payload: bytes) -> None:
    async with hostile(tmp_path, replying(payload)) as (_, client):
        with pytest.raises(GuestError):
            await client.stats(MOST)


async def test_pages_without_end(tmp_path: Path) -> None:
    async def script(call: Call) -> None:
        script.count += 1  # type: ignore[attr-defined]
        payload = page(f"{script.count:064x}", more=True)  # type: ignore[attr-defined]
        call.reply(bytes(StatsResponse(page=payload)))

    script.count = 0  # type: ignore[attr-defined]
    async with hostile(tmp_path, script) as (_, client):
        with pytest.raises(GuestError, match="do not end"):
            await client.stats(MOST)


async def test_an_agent_that_never_answers(tmp_path: Path) -> None:
    async def script(call: Call) -> None: ...

    async with hostile(tmp_path, script) as (_, client):
        with pytest.raises(DeadlineExceeded):
            await client.stats(MOST, timeout=0.2)


async def test_random_bytes_are_an_error(tmp_path: Path) -> None:
    async def script(call: Call) -> None:
        noise = secrets.token_bytes(200)
        call.reply(secrets.choice((noise, bytes(StatsResponse(page=noise)))))

    async with hostile(tmp_path, script) as (_, client):
        for _ in range(20):
            with pytest.raises(HyperpodError):
                await client.stats(MOST)
