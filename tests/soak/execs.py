"""Streaming sessions by the thousand against a whole daemon with host pods, which is killed again and again.

A session that has begun is exact to its last byte whatever becomes of the daemon, for it is the shim's; only one
that has not begun may be tried again. Every thousand sessions all is quiet for a moment: then no process may have
more descriptors, tasks, children or memory than it had at first.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter

from grpclib.exceptions import GRPCError, StreamTerminatedError

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.wire.remotecommand import Wanted
from tests.daemonkit import Cri, Daemon
from tests.execsoak import ECHO, SESSIONS, NotBegun, exec_cgroups
from tests.soak.figures import Figures, figures_of
from tests.soak.pod import need

AT_ONCE = 12
SESSION_TIMEOUT = 120.0
"""Seconds for one session, also while the daemon is away for some of them."""
ROUND = 1000
QUIET = 15.0
"""Seconds for what a vanished client has left to end: SIGKILL comes 10 s after SIGHUP."""
GROWTH_MIB = 24.0
"""Of a process's private memory between the first quiet moment and any later one: the heap of a
shim has holes after sessions (4 to 10 MiB) that come and go; a daemon is measured as young as at first."""
AWAY = (GRPCError, StreamTerminatedError, OSError, AttributeError)
"""What a call may raise while the daemon is killed or starts. The last is grpclib's, of a connection that is lost
between its making and its first request."""
COUNTER = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.2; done"


class Place:
    """The tests' container in the daemon's pod."""

    def __init__(self, daemon: Daemon, pod: str, container: str) -> None:
        self._daemon, self._pod, self._container = daemon, pod, container

    async def exec(self, *argv: str, wanted: Wanted) -> str:
        request = cri.ExecRequest(
            container_id=self._container, cmd=list(argv), tty=wanted.tty, stdin=wanted.stdin,
            stdout=wanted.stdout, stderr=wanted.stderr,
        )  # fmt: skip
        try:
            async with self._daemon.client() as client:
                return (await client.runtime.exec(request)).url
        except AWAY as exc:
            raise NotBegun(str(exc)) from exc

    async def forward(self) -> str:
        try:
            async with self._daemon.client() as client:
                request = cri.PortForwardRequest(pod_sandbox_id=self._pod)
                return (await client.runtime.port_forward(request)).url
        except AWAY as exc:
            raise NotBegun(str(exc)) from exc


class ExecSoak:
    """`count` sessions; the daemon is killed after every `kill` of them, 0: never."""

    def __init__(self, daemon: Daemon, count: int, kill: int, seed: int) -> None:
        self.daemon, self.count, self.kill = daemon, count, kill
        self.done: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._begun = self._next_kill = 0
        self._killing = asyncio.Lock()
        self._began_at = time.monotonic()

    async def run(self, client: Cri) -> None:
        """Raises Broken, or the AssertionError of a session that was not exact."""
        pod = await client.run_pod()
        container, counter = await client.sh(pod, ECHO), await client.sh(pod, COUNTER)
        before = [await client.status(ident) for ident in (container, counter)]
        place = Place(self.daemon, pod, container)
        for session in SESSIONS[:8]:  # what is made once is made
            await session(place, random.Random(self._chance.random()))
        first = await self._calm(pod, container)
        print(f"at first: {first}", file=sys.stderr, flush=True)
        self._next_kill = self.kill or self.count + 1
        while (finished := self.done["session"]) < self.count:
            await self._round(place, min(ROUND, self.count - finished))
            if self.kill:  # a daemon that is as young as the one that was measured at first
                await self._kill_daemon()
            now = await self._calm(pod, container)
            print(f"quiet after {self.done['session']}: {now}", file=sys.stderr, flush=True)
            now.need_no_more_than(first, GROWTH_MIB)
        async with self.daemon.client() as fresh:
            for status in before:
                now_status = await fresh.status(status.id)
                need(
                    (now_status.state, now_status.started_at) == (status.state, status.started_at),
                    f"container {status.id[:12]} was touched: {now_status}",
                )
            lines = [int(text.split()[1]) for _, _, text in await fresh.log(counter)]
            need(lines == list(range(len(lines))), "the counter's log has lost lines or has some twice")
            self.done["log lines"] = len(lines)
            await fresh.remove_pod(pod)

    async def _round(self, place: Place, count: int) -> None:
        turns = asyncio.Semaphore(AT_ONCE)
        reporting = asyncio.ensure_future(self._report())

        async def turn(seed: float) -> None:
            async with turns:
                await self._one(place, seed)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(turn(self._chance.random()))
        finally:
            reporting.cancel()

    async def _one(self, place: Place, seed: float) -> None:
        self._begun += 1
        if self._begun >= self._next_kill:
            self._next_kill += self.kill
            await self._kill_daemon()
        session = random.Random(seed).choice(SESSIONS)
        async with asyncio.timeout(SESSION_TIMEOUT):
            while True:
                try:
                    await session(place, random.Random(seed))
                except NotBegun:
                    self.done["begun anew"] += 1
                    await asyncio.sleep(0.1)
                else:
                    break
        self.done[session.__name__] += 1
        self.done["session"] += 1

    async def _kill_daemon(self) -> None:
        async with self._killing:
            await asyncio.to_thread(self.daemon.kill_daemon)
            self.done["daemon killed"] += 1

    async def _calm(self, pod: str, container: str) -> Figures:
        """Nothing runs: wait until nothing is left of what has run, then look."""
        deadline = time.monotonic() + QUIET
        while left := exec_cgroups(container):
            need(time.monotonic() < deadline, f"execs are left: {left}")
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)  # for what ends when its peer has, and for timers
        return await figures_of(self.daemon, pod)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(10)
            finished, seconds = self.done["session"], time.monotonic() - self._began_at
            print(
                f"{time.strftime('%X')} {finished} of {self.count} sessions, {finished / seconds:.1f}/s | "
                + " ".join(f"{what}={n}" for what, n in sorted(self.done.items()) if what != "session"),
                file=sys.stderr, flush=True,
            )  # fmt: skip
