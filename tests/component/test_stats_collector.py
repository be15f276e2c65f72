"""Who asks for statistics asks each agent once; an agent that does not answer holds nobody up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hyperpod.api.gen.hyperpod.agent.v1 import StatsResponse
from hyperpod.api.gen.hyperpod.agentstats import v1
from hyperpod.container import stats
from hyperpod.container.stats import StatsCollector
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.session import AgentSession
from hyperpod.tasks import TaskOwner
from tests.hostilepeer import Call, Script, hostile
from tests.unit.test_metrics import ONE, _made


class Agent:
    """Answers as long as it may; `asked` counts."""

    def __init__(self) -> None:
        self.asked = self.cpu_ns = 0
        self.answers = True

    async def __call__(self, call: Call) -> None:
        self.asked += 1
        if self.answers:
            self.cpu_ns += 10**8
            cgroup = v1.CgroupStats(cpu_usage_ns=self.cpu_ns)
            page = v1.Page(
                guest=v1.GuestStats(containers=cgroup), containers=[v1.ContainerStats(id=ONE, cgroup=cgroup)]
            )
            call.reply(bytes(StatsResponse(page=bytes(page))))


@asynccontextmanager
async def collecting(folder: Path, script: Script) -> AsyncIterator[tuple[StatsCollector, LiveSandbox]]:
    scratch = folder / "scratch"
    scratch.write_bytes(b"x")
    owner = TaskOwner("test")
    async with hostile(folder, script) as (agent, _):
        sandbox, _, _ = _made()
        sandbox.session = AgentSession(agent.sandbox, agent.endpoint, agent.token)
        await sandbox.session.connect(asyncio.get_running_loop().time() + 20, claim=False)
        yield StatsCollector(owner, lambda _: scratch.stat().st_size), sandbox
        await sandbox.session.close()
        await owner.close()


async def test_callers_share_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "FRESH", 60.0)
    agent = Agent()
    async with collecting(tmp_path, agent) as (collector, sandbox):
        first, second = await asyncio.gather(collector.collect([sandbox]), collector.collect([sandbox]))
        third = await collector.collect([sandbox])
        assert first == second == third
        assert agent.asked == 1
        await collector.collect([sandbox], details=True)
        await collector.collect([sandbox])
        assert agent.asked == 2, "details are not left out, and what has them serves all"
        sample = first[sandbox.id]
        assert sample is not None and set(sample.figures.containers) == {ONE}
        assert sample.nano_cores == {ONE: None, "": None}
        monkeypatch.setattr(stats, "FRESH", 0.5)
        await asyncio.sleep(max(stats.RATE_FIRST, stats.FRESH) + 0.1)
        later = (await collector.collect([sandbox]))[sandbox.id]
        assert later is not None
        rate = later.nano_cores[ONE]
        assert rate is not None and 0 < rate < 10**9


async def test_a_clock_that_was_set_back_takes_no_figures_away(tmp_path: Path) -> None:
    async with collecting(tmp_path, Agent()) as (collector, sandbox):
        later = time.time_ns() + 3600 * 10**9
        sandbox.record = sandbox.record.model_copy(update={"created_at": later})
        sample = (await collector.collect([sandbox]))[sandbox.id]
        assert sample is not None and sample.figures.guest.containers is not None
        assert sample.figures.guest.containers.cpu_usage_ns == 10**8


async def test_a_silent_agent_is_told_by_its_last_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stats, "DEADLINE", 0.2)
    monkeypatch.setattr(stats, "FRESH", 0.0)
    agent = Agent()
    async with collecting(tmp_path, agent) as (collector, sandbox):
        known = await collector.collect([sandbox])
        agent.answers = False
        began = time.monotonic()
        for _ in range(3):
            assert await collector.collect([sandbox]) == known
        assert time.monotonic() - began < 5
        assert len([r for r in caplog.records if "no statistics" in r.message]) == 1
        monkeypatch.setattr(stats, "KEPT", 0.0)
        assert await collector.collect([sandbox]) == {sandbox.id: None}
        agent.answers = True
        monkeypatch.setattr(stats, "DEADLINE", 20.0)
        assert (await collector.collect([sandbox]))[sandbox.id] is not None


async def test_an_agent_that_never_answered_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "DEADLINE", 0.2)
    monkeypatch.setattr(stats, "FIRST_DEADLINE", 0.2)
    agent = Agent()
    agent.answers = False
    async with collecting(tmp_path, agent) as (collector, sandbox):
        assert await collector.collect([sandbox]) == {sandbox.id: None}
