"""What agents report of containers reaches their status once, and keeps nobody busy, whatever an agent says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.container.known import KnownContainers
from hyperpod.container.live import LiveContainer
from hyperpod.container.lives import ContainerLives
from hyperpod.errors import Unavailable
from hyperpod.model.container import ContainerRecord, ContainerState, ContainerStatus
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.session import AgentSession
from hyperpod.shimclient.client import LogEnd
from hyperpod.store.records import RecordStore
from hyperpod.tasks import TaskOwner
from tests.hostilepeer import Call, Script, hostile, message
from tests.unit.test_metrics import ONE, TWO, _made

FLOOD = 1000
"""Exits that fit into the window of one answer."""


@dataclass
class Shim:
    """Whose logs end when the test lets them."""

    ended: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0

    async def log_finish(self, container: str, timeout: float) -> LogEnd:
        self.asked += 1
        await self.ended.wait()
        return LogEnd(complete=True, gap_bytes=0)


@dataclass
class World:
    """A sandbox with the containers ONE, which runs, and TWO, and what follows its agent."""

    sandbox: LiveSandbox
    containers: list[LiveContainer]
    lives: ContainerLives
    owner: TaskOwner
    shim: Shim


@contextlib.asynccontextmanager
async def world(folder: Path, script: Script) -> AsyncIterator[World]:
    owner, shim = TaskOwner("test"), Shim()
    store = RecordStore(folder / "state", "containers", ContainerRecord, ContainerStatus)
    known = KnownContainers(store, cast(Any, None), cast(Any, None))
    (folder / "agent").mkdir()
    async with hostile(folder / "agent", script) as (agent, _):
        sandbox, containers, _ = _made()
        for container in containers:
            await store.create(container.id, container.record, container.status)
            known.add(container)
        sandbox.session = AgentSession(agent.sandbox, agent.endpoint, agent.token)
        sandbox.shim = cast(Any, shim)

        async def remove(_: str) -> None:
            raise AssertionError("nobody asked for it")

        lives = ContainerLives(known, remove, owner)
        yield World(sandbox, containers, lives, owner, shim)
        await sandbox.session.close()
        await owner.close()


def exited(seq: int, ident: str, code: int = 0) -> bytes:
    state = v1.ContainerState(id=ident, state=v1.ContainerStatus.EXITED, exit_code=code)
    return message(bytes(v1.Event(seq=seq, exited=state)))


async def following(one: World) -> None:
    """As SandboxManager does it."""

    async def on_exit(info: Any) -> None:
        one.lives.container_exited(one.sandbox, info)

    async def on_connected(_: object) -> None:
        pass

    await one.sandbox.session.connect(asyncio.get_running_loop().time() + 20, claim=False)
    one.owner.spawn("events", one.sandbox.session.follow(on_exit, on_connected))


async def test_an_exit_that_is_told_a_thousand_times_is_one(tmp_path: Path) -> None:
    """Each would wait for the log, and the tasks of the daemon are counted: those of all pods together."""
    told = asyncio.Event()

    async def script(call: Call) -> None:
        if call.method != "Events":
            return
        call.headers()
        call.data(b"".join(exited(n, ONE, code=7 if n == 1 else 1) for n in range(1, FLOOD)))
        told.set()

    async with world(tmp_path, script) as one:
        await following(one)
        async with asyncio.timeout(30):
            await told.wait()
            while not one.shim.asked:
                await asyncio.sleep(0.01)
        most = 0
        for _ in range(50):
            most = max(most, len(one.owner))
            await asyncio.sleep(0.01)
        assert most <= 2, "one that follows, one that waits for the log"
        one.shim.ended.set()
        async with asyncio.timeout(10):
            await one.containers[0].exited.wait()
        assert one.containers[0].status.exit_code == 7, "the first word counts"
        assert one.shim.asked == 1


@pytest.mark.parametrize("ident", ["0" * 64, TWO])
async def test_exits_of_other_pods_and_of_nobody(tmp_path: Path, ident: str) -> None:
    async def script(call: Call) -> None:
        if call.method == "Events":
            call.headers()
            call.data(exited(1, ident))

    async with world(tmp_path, script) as one:
        other = LiveContainer(
            one.containers[1].record.model_copy(update={"sandbox_id": "e" * 64}), one.containers[1].status
        )
        one.lives._known.add(other)
        await following(one)
        await asyncio.sleep(0.3)
        assert other.state is ContainerState.CREATED
        assert one.shim.asked == 0 and len(one.owner) == 1


async def test_a_call_waits_for_the_next_shim_also_when_it_knows_first_of_the_death(tmp_path: Path) -> None:
    @dataclass
    class Dying:
        alive: bool
        closed: asyncio.Event = field(default_factory=asyncio.Event)
        asked: int = 0

        async def call(self) -> str:
            self.asked += 1
            if not self.alive:
                raise Unavailable("control connection lost: Broken pipe")
            return "fine"

    sandbox, _, _ = _made()
    dead, living = Dying(alive=False), Dying(alive=True)
    sandbox.shim = cast(Any, dead)
    asking = asyncio.ensure_future(sandbox.of_any_shim(lambda shim: cast(Any, shim).call()))
    await asyncio.sleep(0.05)
    dead.closed.set()
    sandbox.shim = None
    await asyncio.sleep(0.05)
    sandbox.shim = cast(Any, living)
    assert await asking == "fine"
    assert (dead.asked, living.asked) == (1, 1)
