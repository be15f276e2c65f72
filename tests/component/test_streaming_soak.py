"""Many sessions of every kind, clients that vanish among them: byte-exact, and nothing is left anywhere.

`./dev soak --execs 10000` is the long one, with a whole daemon.
"""

from __future__ import annotations

import asyncio
import random

from hyperpod.config import StreamingConfig
from hyperpod.wire.remotecommand import Wanted
from tests.agentkit import TIMEOUT, AgentKit, agent_pid
from tests.execsoak import ECHO, SESSIONS, children, descriptors, exec_cgroups
from tests.shimkit import eventually
from tests.streamkit import StreamPod, stream_pod

COUNT, AT_ONCE = 200, 12


class Place:
    def __init__(self, pod: StreamPod, container: str) -> None:
        self._pod, self._container = pod, container

    async def exec(self, *argv: str, wanted: Wanted) -> str:
        return self._pod.exec_url(self._container, *argv, wanted=wanted)

    async def forward(self) -> str:
        return self._pod.forward_url()


async def test_soak(agent: AgentKit) -> None:
    async with stream_pod(agent, StreamingConfig()) as pod:
        container = await pod.run("sh", "-c", ECHO)
        place = Place(pod, container)
        shim, guest = (await pod.shim.hello()).pid, agent_pid(agent.place)
        chance = random.Random(4)
        for session in SESSIONS[:8]:  # what is made once is made
            await session(place, random.Random(chance.random()))
        await asyncio.sleep(1)
        before = {pid: descriptors(pid) for pid in (shim, guest)}
        born = children(guest)
        turns = asyncio.Semaphore(AT_ONCE)

        async def turn(seed: float) -> None:
            async with turns, asyncio.timeout(TIMEOUT):
                mine = random.Random(seed)
                await mine.choice(SESSIONS)(place, mine)

        await asyncio.gather(*(turn(chance.random()) for _ in range(COUNT)))
        await eventually(lambda: all(descriptors(pid) <= count for pid, count in before.items()))
        await eventually(lambda: children(guest) <= born)
        await eventually(lambda: exec_cgroups(container) == [])
