"""A kubelet-like driver: pods come, are probed, swapped, rotated, restarted, stopped and collected."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri, Daemon
from tests.soak.pod import Pod, need

PROBE, STATS, ROTATE, SWAP, TEND, RELIST = 4.0, 10.0, 20.0, 12.0, 2.0, 1.0
"""Seconds between two of each, per pod or, for stats and lists, for the node."""

RSS_LIMIT = 200 << 20
"""Bytes of the daemon at any time; it holds records, not output."""

FD_LIMIT = 200


class Kubelet:
    """Runs `pods` pods; one is replaced after `churn` seconds or more, the daemon killed every `kill` seconds."""

    def __init__(self, daemon: Daemon, client: Cri, *, pods: int, churn: float, kill: float) -> None:
        self.daemon, self.client, self.wanted = daemon, client, pods
        self.churn, self.kill = churn, kill
        self.pods: list[Pod] = []
        self.done: Counter[str] = Counter()
        self._made = 0
        self._busy = 0
        self._calm = asyncio.Condition()
        self._killing = False
        self._wanted_done: Sequence[str] = ()
        self._cpu: dict[str, int] = {}

    async def run(self, seconds: float, done: Sequence[str] = ()) -> None:
        """As long as that, and until each kind of thing in `done` has been done once, however slow this machine is.

        Raises Broken, or what a call that must succeed has raised."""
        end = time.monotonic() + seconds
        self._wanted_done = done
        try:
            async with asyncio.TaskGroup() as group:
                loops = [
                    group.create_task(self._every(RELIST, "list", self._relist)),
                    group.create_task(self._every(STATS, "stats", self._stats)),
                    group.create_task(self._every(10, "report", self._report)),
                ]
                if self.kill:
                    loops.append(group.create_task(self._every(self.kill, "kill", self._kill, calm=False)))
                slots = [group.create_task(self._slot(n, end)) for n in range(self.wanted)]
                await asyncio.wait(slots)
                for task in loops:
                    task.cancel()
        finally:
            for pod in self.pods:
                pod.volumes.remove()

    async def _slot(self, number: int, end: float) -> None:
        """One pod after another until the end; the slots' lives are staggered."""
        lifetime = self.churn * (1 + number / self.wanted)
        while not self._over(end):
            self._made += 1
            pod = Pod(self.client, self.daemon.base / "kubelet", self._made)
            self.pods.append(pod)
            async with self._working():
                await pod.start()
            self.done["pod"] += 1
            await self._live(pod, time.monotonic() + lifetime, end)
            async with self._working():
                await pod.stop()
            self.pods.remove(pod)

    def _over(self, end: float) -> bool:
        return time.monotonic() >= end and all(self.done[what] for what in self._wanted_done)

    async def _live(self, pod: Pod, until: float, end: float) -> None:
        next_at = dict.fromkeys(("probe", "rotate", "swap", "tend"), time.monotonic())
        steps = {"probe": PROBE, "rotate": ROTATE, "swap": SWAP, "tend": TEND}

        async def swap() -> None:
            pod.swap_config()

        calls: dict[str, Callable[[], Awaitable[None]]] = {
            "probe": pod.probe, "rotate": pod.rotate, "swap": swap, "tend": pod.tend,
        }  # fmt: skip
        while time.monotonic() < until and not self._over(end):
            for what, call in calls.items():
                if time.monotonic() >= next_at[what]:
                    async with self._working():
                        await call()
                    self.done[what] += 1
                    next_at[what] = time.monotonic() + steps[what]
            await asyncio.sleep(0.2)

    async def _every(
        self, period: float, what: str, call: Callable[[], Awaitable[None]], *, calm: bool = True
    ) -> None:
        while True:
            await asyncio.sleep(period)
            async with self._working() if calm else contextlib.nullcontext():
                await call()
            self.done[what] += 1

    @contextlib.asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        """Not while the daemon is being killed: calls in flight then would have to fail."""
        async with self._calm:
            await self._calm.wait_for(lambda: not self._killing)
            self._busy += 1
        try:
            yield
        finally:
            async with self._calm:
                self._busy -= 1
                self._calm.notify_all()

    async def _kill(self) -> None:
        """kill -9 of the daemon between two calls; its pods must not notice."""
        async with self._calm:
            self._killing = True
            await self._calm.wait_for(lambda: self._busy == 0)
        await asyncio.to_thread(self.daemon.kill_daemon)
        async with self._calm:
            self._killing = False
            self._calm.notify_all()

    async def _relist(self) -> None:
        """The kubelet's PLEG: the containers of a pod that stands are listed, and the pod as ready."""
        standing = [pod for pod in self.pods if pod.steady]
        pods = (await self.client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
        containers = (await self.client.runtime.list_containers(cri.ListContainersRequest())).containers
        states = {item.id: item.state for item in pods}
        of_web = {item.id: item.state for item in containers}
        for pod in standing:
            if pod.steady:  # still
                need(
                    states.get(pod.id) == cri.PodSandboxState.SANDBOX_READY,
                    f"{pod.name}: not listed as ready",
                )
                state = of_web.get(pod.web)
                need(state == cri.ContainerState.CONTAINER_RUNNING, f"{pod.name}: its server is {state}")
        self.done["running"] = sum(s == cri.ContainerState.CONTAINER_RUNNING for s in of_web.values())

    async def _stats(self) -> None:
        """The kubelet's eviction manager and metrics: present, and never going back."""
        standing = [pod for pod in self.pods if pod.steady]
        reply = await self.client.runtime.list_container_stats(cri.ListContainerStatsRequest())
        for item in reply.stats:
            assert item.attributes is not None
            if item.cpu is None or item.cpu.usage_core_nano_seconds is None:
                continue
            used = item.cpu.usage_core_nano_seconds.value
            before = self._cpu.get(item.attributes.id, 0)
            need(used >= before, f"container {item.attributes.id}: its CPU time went from {before} to {used}")
            self._cpu[item.attributes.id] = used
            self.done["samples"] += 1
        pods = (await self.client.runtime.list_pod_sandbox_stats(cri.ListPodSandboxStatsRequest())).stats
        known = {item.attributes.id for item in pods if item.attributes is not None}
        for pod in standing:
            need(pod.id in known or not pod.steady, f"{pod.name} has no statistics")
        disk = await self.client.images.image_fs_info(cri.ImageFsInfoRequest())
        need(bool(disk.image_filesystems), "no image file system")
        await self.client.runtime.status(cri.StatusRequest())

    async def _report(self) -> None:
        pid = self.daemon.pid()
        rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        fds = len(os.listdir(f"/proc/{pid}/fd"))
        need(rss < RSS_LIMIT, f"the daemon has {rss >> 20} MiB")
        need(fds < FD_LIMIT, f"the daemon has {fds} descriptors")
        done = " ".join(f"{what}={count}" for what, count in sorted(self.done.items()))
        print(f"{time.strftime('%X')} daemon {rss >> 20} MiB {fds} fds | {done}", file=sys.stderr, flush=True)
