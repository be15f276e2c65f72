"""Pods in VMs through the CRI socket: cold starts, phases, the other calls, memory of guest and shim."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.supervisor.client import SupervisorClient
from tests.daemonkit import Cri, Daemon
from tests.perf.bare import BareBoot
from tests.perf.report import Figure, progress, spread

T = TypeVar("T")
MIB = 1024 * 1024
IDLE = 3.0
"""Seconds of rest before memory is looked at."""


class Pods:
    """The figures of several pods, one after the other; between them QEMU boots alone."""

    def __init__(self, daemon: Daemon, client: Cri, bare: BareBoot) -> None:
        self.daemon, self.client, self.bare = daemon, client, bare
        self.alone: list[float] = []
        self.seconds: dict[str, list[float]] = {}
        self.phases: dict[str, list[float]] = {}
        self.guest_mib: list[float] = []
        self.shim_mb: list[float] = []

    async def _timed(self, name: str, call: Awaitable[T]) -> T:
        start = time.monotonic()
        result = await call
        self.seconds.setdefault(name, []).append(time.monotonic() - start)
        return result

    async def run(self, rounds: int) -> None:
        for number in range(1, rounds + 1):
            self.alone.append(await asyncio.to_thread(self.bare.measure))
            await self._pod()
            progress(
                f"boot {number} of {rounds}: QEMU alone to init {self.alone[-1]:.2f} s, "
                f"RunPodSandbox {self.seconds['RunPodSandbox'][-1]:.2f} s"
            )

    async def _pod(self) -> None:
        client, runtime = self.client, self.client.runtime
        pod = await self._timed("RunPodSandbox", client.run_pod())
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
        timings = json.loads((await runtime.pod_sandbox_status(request)).info["timings"])
        for phase, seconds in timings.items():
            self.phases.setdefault(phase, []).append(seconds)
        container = await self._timed("CreateContainer", client.create(pod, "/bin/sleep", "600"))
        await self._timed("StartContainer", client.start(container))
        for _ in range(3):
            await self._timed("ExecSync true", client.exec(container, "/bin/true"))
        await asyncio.sleep(IDLE)
        self.shim_mb.append(await self._shim_private(pod))
        meminfo = (await client.exec(container, "/bin/cat", "/proc/meminfo")).stdout.decode()
        self.guest_mib.append(_used_kib(meminfo) / 1024)
        await self._timed("StopContainer, grace 0", client.stop(container))
        remove = cri.RemoveContainerRequest(container_id=container)
        await self._timed("RemoveContainer", runtime.remove_container(remove))
        stop = cri.StopPodSandboxRequest(pod_sandbox_id=pod)
        await self._timed("StopPodSandbox", runtime.stop_pod_sandbox(stop))
        gone = cri.RemovePodSandboxRequest(pod_sandbox_id=pod)
        await self._timed("RemovePodSandbox", runtime.remove_pod_sandbox(gone))

    async def _shim_private(self, pod: str) -> float:
        """MB that only the shim of this pod has mapped."""
        supervisor = SupervisorClient(str(self.daemon.run_dir / "supervisor.sock"))
        await supervisor.connect(10.0)
        try:
            [pid] = [shim.pid for shim in await supervisor.list() if shim.sandbox_id == pod]
        finally:
            await supervisor.close()
        return private_bytes(pid) / 1e6

    def figures(self) -> list[Figure]:
        ratios = [mine / bare for mine, bare in zip(self.seconds["RunPodSandbox"], self.alone, strict=True)]
        return [
            Figure("RunPodSandbox, cold, over QEMU alone to init", statistics.median(ratios), "x", 3.0,
                   note=f"of {len(ratios)} pairs: {spread(ratios)}"),
            Figure("guest memory used, agent idle, no page cache", statistics.median(self.guest_mib), "MiB", 40.0,
                   note="MemTotal - MemFree - Buffers - Cached, one container asleep"),
            Figure("private memory of an idle shim", statistics.median(self.shim_mb), "MB", 8.0,
                   note="Private_* of smaps_rollup"),
        ]  # fmt: skip

    def times(self) -> list[list[str]]:
        """Rows: what, median seconds, range."""
        named = {"QEMU alone to init": self.alone, **self.seconds}
        named |= {f"  phase {name}": values for name, values in self.phases.items()}
        return [
            [name, f"{statistics.median(v):.3f}", f"{min(v):.3f} to {max(v):.3f}"]
            for name, v in named.items()
        ]


def private_bytes(pid: int) -> int:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Private_"))


def _used_kib(meminfo: str) -> int:
    rows = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if ":" in line}
    return rows["MemTotal"] - rows["MemFree"] - rows["Buffers"] - rows["Cached"]
