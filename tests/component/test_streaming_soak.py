"""Many execs with random sizes, half-closes and clients that vanish: byte-exact, and nothing is left anywhere.

HYPERPOD_SOAK=10000 makes it long.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from pathlib import Path

from hyperpod.config import StreamingConfig
from tests.agentkit import TIMEOUT, AgentKit, agent_pid
from tests.shimkit import eventually
from tests.streamkit import ALL, OUT, Command, StreamPod, exit_code, stream_pod

COUNT = int(os.environ.get("HYPERPOD_SOAK", "200"))
AT_ONCE = 12


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> int:
    """Of the agent: crun, and every process of its containers, or their parents."""
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


async def one(pod: StreamPod, container: str, chance: random.Random) -> None:
    code, data = chance.randrange(256), chance.randbytes(chance.choice((0, 1, 1000, 70_000, 600_000)))
    kind = chance.randrange(6)
    if kind < 3:  # echo, to the end
        command = await Command.open(
            pod.exec_url(container, "sh", "-c", f"cat; exit {code}", wanted=ALL), ALL
        )
        sending = asyncio.ensure_future(_send(command, data, chance))
        out, err, status = await command.result()
        await sending
        assert (out, err, exit_code(status)) == (data, b"", code)
    elif kind == 3:  # output only, both streams
        count = chance.randrange(20_000)
        script = f"seq {count}; seq {count} >&2; exit {code}"
        out, err, status = await (await Command.open(pod.exec_url(container, "sh", "-c", script))).result()
        assert out == err == b"".join(b"%d\n" % i for i in range(1, count + 1))
        assert exit_code(status) == code
    elif kind == 4:  # a client that vanishes, sooner or later
        command = await Command.open(pod.exec_url(container, "sh", "-c", "yes & sleep 1000", wanted=OUT))
        await asyncio.sleep(chance.random() * 0.2)
        command.client.abort()
    else:  # one that leaves its input open and says goodbye
        command = await Command.open(pod.exec_url(container, "cat", wanted=ALL), ALL)
        await command.write(data[:1000] + b"x")
        await command.until(b"x")
        await command.client.close()


async def _send(command: Command, data: bytes, chance: random.Random) -> None:
    position = 0
    while position < len(data):
        step = chance.choice((1, 500, 32_768, 100_000))
        await command.write(data[position : position + step])
        position += step
    await command.end()


async def test_soak(agent: AgentKit) -> None:
    async with stream_pod(agent, StreamingConfig()) as pod:
        container = await pod.run("sleep", "100000")
        shim, guest = (await pod.shim.hello()).pid, agent_pid(agent.place)
        chance = random.Random(4)
        for _ in range(5):  # what is made once is made
            await one(pod, container, random.Random(chance.random()))
        await asyncio.sleep(1)
        before = {pid: descriptors(pid) for pid in (shim, guest)}
        born = children(guest)
        turns = asyncio.Semaphore(AT_ONCE)

        async def turn(seed: float) -> None:
            async with turns, asyncio.timeout(TIMEOUT):
                await one(pod, container, random.Random(seed))

        await asyncio.gather(*(turn(chance.random()) for _ in range(COUNT)))
        await eventually(lambda: all(descriptors(pid) <= count for pid, count in before.items()))
        await eventually(lambda: children(guest) <= born)
        cgroups = list(Path("/sys/fs/cgroup").rglob(container))
        left = [p.name for path in cgroups for p in path.iterdir() if re.fullmatch("[0-9a-f]{32}", p.name)]
        assert left == []
